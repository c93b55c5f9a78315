"""Attention's output projection W_O in a plain checkpoint, by architecture.

Its input is the concatenation of all heads' outputs, head 0 first, so column `h * d_head + i` multiplies entry i of head h.
"""

import re
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lofit_lens.errors import ModelError
from lofit_lens.sharing.checkpoints import Checkpoint

# Architecture -> the part of the module's name after the list of layers. GPT-2 stores weights transposed (Conv1D).
_IN_LAYER = {
    **dict.fromkeys(
        (
            "LlamaForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "MistralForCausalLM",
            "MixtralForCausalLM", "OlmoForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoeForCausalLM",
            "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "GptOssForCausalLM",
        ),
        ("layers", "self_attn.o_proj"),
    ),
    "OPTForCausalLM": ("layers", "self_attn.out_proj"),
    "GPT2LMHeadModel": ("h", "attn.c_proj"),
    "GPTNeoXForCausalLM": ("layers", "attention.dense"),
}  # fmt: skip
KNOWN = tuple(_IN_LAYER)
_TRANSPOSED = ("GPT2LMHeadModel",)


@dataclass(frozen=True)
class Outputs:
    """The output projections of a checkpoint's layers.

    Attributes:
        checkpoint: the checkpoint.
        names: names of the modules, one per layer: `"model.layers.3.self_attn.o_proj"`.
        transposed: whether weights are stored as `[n_heads * d_head, d_model]`.
    """

    checkpoint: Checkpoint
    names: tuple[str, ...]
    transposed: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(n_layers, n_heads, d_head)`.

        Raises:
            ModelError: a configuration without a number of heads that divides the projection's input.
        """
        n_heads = self.checkpoint.config.get("num_attention_heads", self.checkpoint.config.get("n_head"))
        width = self.checkpoint.shape(f"{self.names[0]}.weight")[0 if self.transposed else 1]
        if not isinstance(n_heads, int) or n_heads < 1 or width % n_heads:
            raise ModelError(
                f"{self.checkpoint.name} says {n_heads!r} heads, but their concatenated outputs have width {width}"
            )
        return len(self.names), n_heads, width // n_heads

    @property
    def d_model(self) -> int:
        """Size of the projection's output."""
        return self.checkpoint.shape(f"{self.names[0]}.weight")[1 if self.transposed else 0]

    def weight(self, layer: int) -> Float[Tensor, "d_model z"]:
        """W_O of a layer, `[d_model, n_heads * d_head]`, which multiplies z from the left; float32, or float64 as stored."""
        found = _wide(self.checkpoint.read(f"{self.names[layer]}.weight"))
        return found.T if self.transposed else found

    def bias(self, layer: int) -> Float[Tensor, " d_model"] | None:
        """b_O of a layer, float32 or float64 as stored; None if the checkpoint has none."""
        name = f"{self.names[layer]}.bias"
        return _wide(self.checkpoint.read(name)) if name in self.checkpoint.where else None

    def raw(self, weight: Float[Tensor, "d_model z"]) -> Tensor:
        """A weight as the checkpoint stores it."""
        return weight.T.contiguous() if self.transposed else weight


def outputs_of(checkpoint: Checkpoint) -> Outputs:
    """Find the output projection of every layer.

    Raises:
        ModelError: an architecture that is not known here, a layer without an output projection, or layers of several shapes.
    """
    architecture = checkpoint.architecture
    if architecture not in _IN_LAYER:
        raise ModelError(
            f"{checkpoint.name}: exporting an adapter into a {architecture} is not supported "
            f"(supported: {', '.join(KNOWN)}). "
            "Nothing was written. Attach the adapter at run time instead: load_adapter(folder, model=model).attached(model)"
        )
    layers, module = _IN_LAYER[architecture]
    pattern = re.compile(rf"((?:.*\.)?{layers}\.(\d+)\.{re.escape(module)})\.weight")
    hits = [hit for name in checkpoint.where if (hit := pattern.fullmatch(name))]
    names = {int(hit[2]): hit[1] for hit in hits}
    n_layers = checkpoint.config.get("num_hidden_layers", checkpoint.config.get("n_layer"))
    if len(hits) != len(names) or sorted(names) != list(range(len(names))) or len(names) != n_layers or not names:
        raise ModelError(
            f"{checkpoint.name} holds output projections (*.{module}) of the layers {sorted(names)}, but its configuration says "
            f"{n_layers} layers; fetch or save it again"
        )
    found = Outputs(checkpoint, tuple(names[i] for i in range(len(names))), architecture in _TRANSPOSED)
    _check_shapes(found)
    return found


def _check_shapes(found: Outputs) -> None:
    """Check by the files' headers that every layer has the shape of the first."""
    checkpoint, first = found.checkpoint, f"{found.names[0]}.weight"
    expected = {"weight": checkpoint.shape(first)}
    if len(expected["weight"]) != 2 or 0 in expected["weight"]:
        raise ModelError(f"{checkpoint.name}: {first} has shape {list(expected['weight'])}; expected a matrix")
    expected["bias"] = (found.d_model,)
    for name in found.names:
        for part, shape in expected.items():
            tensor = f"{name}.{part}"
            if tensor in checkpoint.where and checkpoint.shape(tensor) != shape:
                raise ModelError(
                    f"{checkpoint.name}: {tensor} has shape {list(checkpoint.shape(tensor))}; expected {list(shape)}, as of "
                    f"{first}; fetch or save it again"
                )


def _wide(values: Tensor) -> Tensor:
    """Widen half precision to float32; other dtypes are unchanged."""
    return values if values.is_floating_point() and values.itemsize >= 4 else values.float()
