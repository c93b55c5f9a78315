"""Head scores for MIB's circuit track (arXiv 2504.13151; github.com/hannamw/MIB-circuit-track), as EAP-IG's `Graph` reads them.

A head is the node `a{layer}.h{head}`. `input` and the MLPs `m{layer}` have no score: the benchmark keeps them in every circuit,
and measures the sizes of circuits (0.1 % to 100 %) in scored nodes, which are the heads.
"""

from pathlib import Path
from typing import Any

from lofit_lens import io
from lofit_lens.errors import InputError
from lofit_lens.heads import HeadScores, HeadSet
from lofit_lens.models import model_info


def export_circuit(scores: HeadScores, file: str | Path, model: Any, *, overwrite: bool = False) -> Path:
    """Write head scores as a circuit with one score per node, for `run_evaluation.py --level node --circuit-files FILE`.

    Args:
        scores: scores of all heads; the benchmark takes the largest first (by absolute value with `--absolute`).
        file: its name must end in `.json`, by which the benchmark recognizes the format.
        model: the loaded model that was scored, for its d_model and whether attention and MLP run in parallel.
        overwrite: replace an existing file.

    Raises:
        InputError: another ending, an existing file or one that cannot be written, scores of another shape than the model's, or a
            model with layers without heads, which the format cannot express.
    """
    path, info = Path(file), model_info(model)
    if path.suffix != ".json":
        raise InputError(
            f"{path} does not end in .json, by which MIB's script recognizes the format; name it {path}.json"
        )
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; give another name, or overwrite it (overwrite=True, --overwrite)")
    if tuple(scores.shape) != (info.n_layers, info.n_heads):
        raise InputError(
            f"the scores are of {scores.shape[0]} layers x {scores.shape[1]} heads, but {info.name} has {info.n_layers} x "
            f"{info.n_heads}; give the model that was scored"
        )
    if len(scores.shape.layers) < info.n_layers:
        raise InputError(
            f"{info.name} has heads in {len(scores.shape.layers)} of {info.n_layers} layers, but a circuit of MIB has heads in "
            "all; give scores of a model with attention in every layer"
        )
    nodes: dict[str, dict[str, Any]] = {"input": {"in_graph": True}}
    nodes |= {f"m{layer}": {"in_graph": True} for layer in range(info.n_layers)}
    nodes |= {
        f"a{head.layer}.h{head.head}": {"in_graph": True, "score": scores[head]} for head in HeadSet.all(scores.shape)
    }
    nodes["logits"] = {"in_graph": True}
    parallel = bool(model.cfg.parallel_attn_mlp)
    config = {
        "n_layers": info.n_layers, "n_heads": info.n_heads, "parallel_attn_mlp": parallel, "d_model": info.d_model,
    }  # fmt: skip
    return io.write_json(path, {"cfg": config, "nodes": nodes, "edges": {}})
