"""Model cards: an adapter's page on the Hugging Face hub, `README.md` with a YAML record at its top.

A card states what is known, and says so if something is unknown.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lofit_lens import io
from lofit_lens.errors import InputError
from lofit_lens.hub import commit_of
from lofit_lens.models import ModelInfo

Adapter = Any  # `base.Adapter`, which builds on this module


def model_card(adapter: Adapter, *, repo_id: str | None = None, license: str | None = None) -> str:
    """Write an adapter's card: a YAML record for the hub's search and tables, and a description in Markdown.

    Args:
        adapter: the adapter that it describes.
        repo_id: where the card will be, `"user/repo"`; None = beside the adapter's files.
        license: as the hub abbreviates it (`"mit"`, `"apache-2.0"`, `"cc-by-4.0"`); None = the card says that none was given.

    Returns:
        Markdown; `huggingface_hub.ModelCard` reads it.

    Raises:
        InputError: a license with characters that the hub's abbreviations do not have.
    """
    if license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.\-]*", license):
        raise InputError(
            f"license {license!r} is not as the hub abbreviates licenses: small letters, digits, dots and dashes (mit, "
            "apache-2.0, cc-by-4.0; other for any other one)"
        )
    base, (heading, places) = adapter.meta.model, adapter.places()
    return "\n\n".join([
        f"---\n{_record(adapter, repo_id, license)}\n---",
        f"# {adapter.title} adapter for {_code(_short(base.name)) if base else 'an unnamed base model'}",
        _about(adapter), f"## {heading}", places, "## How to load", _loading(adapter, repo_id),
        "## Metrics", _metrics(adapter.meta.metrics), "## Training", _training(adapter),
        "## Limits", _limits(adapter, license),
    ]) + "\n"  # fmt: skip


def _record(adapter: Adapter, repo_id: str | None, license: str | None) -> str:
    """Write the YAML record, without the lines around it."""
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation", dataset_type=m["task"], dataset_name=m["task"], dataset_config=m["form"] or None,
            dataset_split=m["split"], metric_type=m["metric"], metric_name=m["metric"], metric_value=m["mean"],
            metric_args={"interval_95": m["interval"], "n": m["n"], "seeds": m["seeds"], "data_hash": m["data_hash"]},
        )
        for m in adapter.meta.metrics
    ]  # fmt: skip
    base = adapter.meta.model
    on_hub = base is not None and _on_hub(base)
    return ModelCardData(
        license=license,
        library_name="lofit_lens",
        base_model=base.name if base and on_hub else None,
        base_model_relation="adapter" if on_hub else None,
        pipeline_tag="text-generation",
        tags=["lofit_lens", adapter.method, "activation-steering", "transformer-lens"],
        model_name=(repo_id or adapter.title).rpartition("/")[2] if results else None,
        eval_results=results or None,
    ).to_yaml()


def _on_hub(base: ModelInfo) -> bool:
    """Return whether a base model's name is that of a repository, as far as its record shows."""
    if base.revision is not None:
        return commit_of(base.revision) is not None
    return bool(re.fullmatch(r"[\w\-][\w.\-]*/[\w\-][\w.\-]*", base.name)) and not Path(base.name).exists()


def _short(name: str) -> str:
    """Return a model's name; for a folder only its last part, since paths are private."""
    return Path(name).name if Path(name).is_absolute() else name


def _about(adapter: Adapter) -> str:
    what = sys.modules[type(adapter).__module__].__doc__ or adapter.title
    base = adapter.meta.model
    if base is None:
        made_for = "Made for: not recorded."
    else:
        revision = f"revision `{base.revision}`" if base.revision else "revision not recorded"
        made_for = (
            f"Made for {_code(_short(base.name))}, {revision}: {base.n_layers} layers of {base.n_heads} heads, loaded as "
            f"{base.class_name} in {base.dtype}, {'with' if base.processed else 'without'} TransformerLens' weight processing."
        )
    return "\n\n".join([
        what.strip().split("\n\n")[0], made_for,
        f"It acts at positions `{adapter.positions}` and holds {adapter.n_parameters:,} learned or estimated numbers.",
    ])  # fmt: skip


def _loading(adapter: Adapter, repo_id: str | None) -> str:
    base = adapter.meta.model
    imports, model = "", 'll.load_model("...")  # the base model, which was not recorded'
    if base is not None:
        name, pinned = (
            json.dumps(_short(base.name), ensure_ascii=False),
            commit_of(base.revision),
        )
        revision = f', revision="{base.revision}"' if pinned else ""
        backend = f', backend="{adapter.backend}"' if adapter.backend else ""
        model = f"ll.load_model({name}{revision}{backend})"
        if base.processed and base.backend == "hooked":
            imports = "from transformer_lens import HookedTransformer\n\n"
            model = f"HookedTransformer.from_pretrained({name})  # with weight processing"
        elif base.processed:
            imports = "from transformer_lens.model_bridge import TransformerBridge\n\n"
            model = f"TransformerBridge.boot_transformers({name})\nmodel.enable_compatibility_mode()"
    lines = [
        f"{imports}import lofit_lens as ll", "", f"model = {model}",
        f'adapter = ll.load_adapter("{repo_id or "."}", model=model)',
        "with adapter.attached(model):", '    text = ll.generate(model, "Q: Who wrote Hamlet? A:")',
    ]  # fmt: skip
    pin = "`load_adapter(..., revision=...)` pins a commit of this repository." if repo_id else "Run it in this folder."
    return "\n".join(["```python", *lines, "```", "", pin])


def _metrics(metrics: Sequence[dict[str, Any]]) -> str:
    if not metrics:
        return "None were recorded."
    rows = [
        (
            plain(m["task"]), plain(m["split"]), plain(m["form"] or "-"), plain(m["metric"]), f"{m['mean']:.4g}",
            "{:.4g} to {:.4g}".format(*m["interval"]) if m["interval"] else "none (one value)",
            str(m["n"]), str(m["seeds"]), plain(m["data_hash"][:12] or "not recorded"),
        )
        for m in metrics
    ]  # fmt: skip
    columns = ("task", "split", "form", "metric", "mean", "95 % interval", "items", "seeds", "data hash")
    return table(columns, rows)


def _training(adapter: Adapter) -> str:
    meta = adapter.meta
    rows = [
        ("task", plain(meta.task)),
        ("data hash (SHA-256)", plain(meta.data_hash)),
        ("training examples", "" if meta.n_train is None else f"{meta.n_train:,}"),
        ("seed", "" if meta.seed is None else str(meta.seed)),
        *(
            (name, plain(version))
            for name, version in (meta.versions or io.environment()).items()
            if name != "platform"
        ),
    ]
    text = table(("", ""), [(name, value or "not recorded") for name, value in rows])
    if not meta.config:
        return f"{text}\n\nSettings: not recorded."
    settings = json.dumps(meta.config, indent=2, ensure_ascii=False).replace("```", "'''")
    return f"{text}\n\n```json\n{settings}\n```"


def _limits(adapter: Adapter, license: str | None) -> str:
    where = "at every position, prompt included" if adapter.positions.everywhere else f"only at `{adapter.positions}`"
    may = f"License of the adapter: {license}." if license else "No license was given for the adapter; ask its author."
    points = [
        "The numbers fit the base model named above, at that revision; other weights of the same shape are another model.",
        *_base_limits(adapter.meta.model),
        f"It was made to act {where}. The same numbers at other positions are another method.",
        "Metrics hold for their task, split and form. Nothing is said about other tasks, about harms or about bias.",
        "The base model is not part of these files; its own license and terms of use apply to it.",
        may,
    ]
    return "\n".join(f"- {point}" for point in points)


def _base_limits(base: ModelInfo | None) -> Iterator[str]:
    if base is None or base.revision is None:
        yield "The base model's revision was not recorded, so that loading cannot check it."
    if base is not None and base.name == "organism":
        yield "The base model is the small one that lofit_lens includes."
    elif base is not None and (base.revision or "").startswith("sha256:"):
        yield "The base model was read from a local folder, identified only by its weights' checksum: give your own path to it."


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(value: Any) -> str:
    """Write a value in one line, with characters that Markdown or HTML would interpret escaped."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(str(value).split()))


def _code(text: str) -> str:
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"
