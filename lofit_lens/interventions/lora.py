"""LoRA: `x W + (alpha / rank) x A^T B^T` in attention's projections (arXiv 2106.09685, section 4.1), through peft's own layers.

An adapter holds its own numbers. While it is attached, a peft layer wraps each projection of the bridge and uses these
numbers; afterwards the bridge has its own modules back. So one model serves any number of adapters, seeds and ranks, and is
never reloaded. (peft's usual way changes the whole Hugging Face model before the bridge is made from it. It gives the same
logits, but has no effect on fused projections such as GPT-2's, which the bridge does not run.)

peft is imported when an adapter is first attached.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lofit_lens import io
from lofit_lens.checks import check_number, check_seed, check_whole, texts_of
from lofit_lens.errors import AdapterError, InputError, ModelError, unknown
from lofit_lens.interventions.base import Adapter, AdapterMeta
from lofit_lens.interventions.files import check_tensors
from lofit_lens.models import (
    PROJECTIONS,
    backend_of,
    load_model,
    model_info,
    projection,
    projection_replaced,
    projection_sizes,
)

RANK, ALPHA, TARGETS = 8, 16.0, ("q", "v")
Sizes = Mapping[str, tuple[int, int]]  # projection -> widths of its input and output


class Lora(Adapter):
    """A low-rank change of some of attention's projections, in every layer.

    Args:
        n_layers: layers of the model.
        sizes: projection (`q`, `k`, `v`, `o`) -> widths of its input and output.
        rank: rank of each change.
        alpha: the change is scaled by `alpha / rank`.
        meta: provenance.

    Attributes:
        A: `L{layer}_{projection}` -> `[rank, width in]` float32.
        B: the same keys -> `[width out, rank]` float32, 0 at the start, which leaves the model bit-equal.

    All are trainable until `fit` has trained them. There is no dropout. A new adapter holds no numbers before `reset_`.

    Raises:
        InputError: a rank below 1, an alpha that is not positive, no projection or an unknown one.
    """

    method: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    backend: ClassVar[str | None] = "bridge"

    def __init__(
        self, n_layers: int, sizes: Sizes, *, rank: int = RANK, alpha: float = ALPHA, meta: AdapterMeta | None = None
    ) -> None:
        super().__init__(meta)
        check_whole(1, rank=rank)
        check_number(alpha=alpha)
        if alpha <= 0:
            raise InputError(f"alpha is {alpha}; it must be above 0 and finite")
        self.n_layers, self.rank, self.alpha = n_layers, rank, float(alpha)
        self.sizes = {name: sizes[name] for name in parse_targets(list(sizes))}
        self.A, self.B = nn.ParameterDict(), nn.ParameterDict()
        for key, (_, name) in self._projections().items():
            n_in, n_out = self.sizes[name]
            self.A[key] = nn.Parameter(torch.zeros(rank, n_in))
            self.B[key] = nn.Parameter(torch.zeros(n_out, rank))

    @classmethod
    def for_model(
        cls, model: Any, *, rank: int = RANK, alpha: float = ALPHA, targets: Iterable[str] = TARGETS, seed: int
    ) -> "Lora":
        """Make an adapter that changes nothing yet, on the model's device; see `reset_`.

        Args:
            model: any TransformerBridge.
            rank: rank of each change.
            alpha: the change is scaled by `alpha / rank`.
            targets: projections, `q`, `k`, `v`, `o`; Hugging Face's `q_proj` and so on mean the same.
            seed: seed of A.

        Raises:
            InputError: a rank below 1, an alpha that is not positive, no projection or an unknown one.
            ModelError: a HookedTransformer; a layer without such a projection; layers whose projections differ in size.
        """
        info, names = model_info(model), parse_targets(targets)
        _check_free(model, info.n_layers, names)
        found = projection_sizes(model, [(layer, name) for layer in range(info.n_layers) for name in names])
        sizes = {name: found[0, name] for name in names}
        made = cls(info.n_layers, sizes, rank=rank, alpha=alpha)
        made.meta = AdapterMeta(model=info, seed=seed, versions=io.environment())
        made._check_sizes(found)
        return made.reset_(seed).to(next(projection(model, (0, names[0])).parameters()).device)

    @torch.no_grad()
    def reset_(self, seed: int) -> "Lora":
        """Redraw A, set B to 0, and make both trainable.

        A is uniform within +-1/sqrt(width in), as peft draws it, from one CPU generator, layer by layer, the same everywhere.
        """
        check_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        for key, A in self.A.items():
            bound = A.shape[1] ** -0.5
            A.copy_(torch.empty(A.shape).uniform_(-bound, bound, generator=generator))
            self.B[key].zero_()
        return self.requires_grad_(True)

    @property
    def n_parameters(self) -> int:
        """Count of its numbers: `rank * (width in + width out)` for each projection of each layer."""
        return sum(p.numel() for p in self.parameters())

    @property
    def targets(self) -> tuple[str, ...]:
        """The projections that are changed."""
        return tuple(self.sizes)

    def _projections(self) -> dict[str, tuple[int, str]]:
        return {f"L{layer}_{name}": (layer, name) for layer in range(self.n_layers) for name in self.sizes}

    def places(self) -> tuple[str, str]:
        """Describe projections, rank and alpha."""
        return "Where it acts", (
            f"Attention's projections {', '.join(self.sizes)} in all {self.n_layers} layers, rank {self.rank}, "
            f"alpha {self.alpha:g}."
        )

    # ---------------------------------------------------------------------------------------------- attaching

    def _check_shape(self, model: Any) -> None:
        info = model_info(model)
        if info.processed:
            raise AdapterError(
                f"{info.name} was loaded with processed weights, whose projections are not the original model's; load it "
                "without processing (lofit_lens.load_model)"
            )
        if info.n_layers != self.n_layers:
            raise AdapterError(
                f"this adapter has {self.n_layers} layers{self._made_for}; {info.name} has {info.n_layers}. Load the model it "
                "was made for"
            )
        _check_free(model, self.n_layers, self.targets)
        self._check_sizes(projection_sizes(model, self._projections().values()))

    def _check_sizes(self, found: Mapping[tuple[int, str], tuple[int, int]]) -> None:
        for (layer, name), size in found.items():
            if size != tuple(self.sizes[name]):
                raise AdapterError(
                    f"projection {name} of layer {layer} has widths {size}; this adapter{self._made_for} has {self.sizes[name]} "
                    "for it in every layer. Load the model it was made for, or choose other targets"
                )

    @contextlib.contextmanager
    def _in_place(self, model: Any) -> Iterator[None]:
        places = self._projections()
        for key, place in places.items():  # peft's layer computes on the projection's device
            device = next(projection(model, place).parameters()).device
            for p in (self.A[key], self.B[key]):
                p.data = p.data.to(device)
        layers = self._peft_layers({key: projection(model, place) for key, place in places.items()})
        with contextlib.ExitStack() as stack:
            for key, place in places.items():
                stack.enter_context(projection_replaced(model, place, layers[key]))
            yield

    def _peft_layers(self, own: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
        """peft's layers around these modules, with this adapter's parameters in them."""
        from peft import LoraConfig, inject_adapter_in_model

        trainable = [p for module in own.values() for p in module.parameters() if p.requires_grad]
        options: dict[str, Any] = {"r": self.rank, "lora_alpha": self.alpha, "lora_dropout": 0.0, "bias": "none"}
        config = LoraConfig(target_modules=list(own), **options)
        # On the meta device nothing is drawn, so no random state is touched.
        made: Any = inject_adapter_in_model(config, nn.ModuleDict(own), low_cpu_mem_usage=True)
        for p in trainable:
            p.requires_grad_(True)
        for key in own:
            made[key].lora_A["default"].weight = self.A[key]
            made[key].lora_B["default"].weight = self.B[key]
        return dict(made.items())

    # ------------------------------------------------------------------------------------------------- saving

    def _tensors(self) -> Mapping[str, Tensor]:
        # One tensor for all layers of a projection: q.A is [n_layers, rank, width in], q.B [n_layers, width out, rank].
        return {
            f"{name}.{side}": torch.stack(
                [held[key].detach().cpu() for key, place in self._projections().items() if place[1] == name]
            )
            for name in self.sizes
            for side, held in (("A", self.A), ("B", self.B))
        }

    def _settings(self) -> dict[str, Any]:
        return {
            "n_layers": self.n_layers, "rank": self.rank, "alpha": self.alpha, "targets": list(self.targets),
            "sizes": [list(size) for size in self.sizes.values()],
        }  # fmt: skip

    @classmethod
    def _made_from(cls, record: dict[str, Any], tensors: dict[str, Tensor], meta: AdapterMeta, where: Path) -> "Lora":
        pairs = zip(record["targets"], record["sizes"], strict=True)
        sizes = {str(name): (int(n_in), int(n_out)) for name, (n_in, n_out) in pairs}
        n_layers, rank, shapes = int(record["n_layers"]), int(record["rank"]), {}
        for name, (n_in, n_out) in sizes.items():
            shapes |= {f"{name}.A": (n_layers, rank, n_in), f"{name}.B": (n_layers, n_out, rank)}
        check_tensors(tensors, shapes, where)
        made = cls(n_layers, sizes, rank=rank, alpha=float(record["alpha"]), meta=meta)
        with torch.no_grad():
            for key, (layer, name) in made._projections().items():
                made.A[key].copy_(tensors[f"{name}.A"][layer])
                made.B[key].copy_(tensors[f"{name}.B"][layer])
        return made.requires_grad_(False)

    def _parts(self) -> list[str]:
        return [
            f"rank {self.rank}", f"alpha {self.alpha:g}", f"{' '.join(self.targets)} of {self.n_layers} layers",
            f"{self.n_parameters:,} parameters",
        ]  # fmt: skip


def load_lora(
    name_or_path: Any,
    *,
    rank: int = RANK,
    alpha: float = ALPHA,
    targets: Iterable[str] = TARGETS,
    seed: int = 0,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    revision: str | None = None,
    tokenizer: Any = None,
) -> tuple[Any, Lora]:
    """Load a model as a bridge, and make a new LoRA adapter for it.

    The bridge is an ordinary one, as `load_model(..., backend="bridge")` gives it; further adapters for it are made by
    `Lora.for_model`. Arguments and errors are those of the two.
    """
    model = load_model(
        name_or_path, backend="bridge", dtype=dtype, device=device, tokenizer=tokenizer, revision=revision
    )
    return model, Lora.for_model(model, rank=rank, alpha=alpha, targets=targets, seed=seed)


def parse_targets(targets: Iterable[str]) -> tuple[str, ...]:
    """Return names of projections, each once; `q_proj` means `q`.

    Raises:
        InputError: no name, or an unknown one.
    """
    names = tuple(dict.fromkeys(t.removesuffix("_proj") for t in texts_of("targets", targets)))
    for name in names:
        if name not in PROJECTIONS:
            raise unknown("target", name, PROJECTIONS, hint="LoRA changes attention's projections.")
    if not names:
        raise InputError(f"no target for LoRA; give some of {', '.join(PROJECTIONS)}")
    return names


def _check_free(model: Any, n_layers: int, names: Iterable[str]) -> None:
    """Raise unless a model has modules for its projections, and none of these holds a LoRA adapter."""
    name = model_info(model).name
    if backend_of(model) == "hooked":
        raise ModelError(
            f"LoRA needs the projection modules of a Hugging Face model, but {name} is a HookedTransformer, which has bare "
            "weights: load it with load_model(..., backend='bridge'), or together with its adapter with load_lora(...)"
        )
    if any(hasattr(projection(model, (layer, n)), "lora_A") for layer in range(n_layers) for n in names):
        raise AdapterError(f"{name} holds a LoRA adapter already; detach() it, or leave its `with` block")
