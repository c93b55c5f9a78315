"""One adapter of every method on a model, random numbers, provenance filled in: for tests of files."""

import torch

from lofit_lens import ITI, ContrastVectors, HeadSet, Lora, LoReft, PostBlock, Red, RepE
from lofit_lens.interventions import HeadAblation
from lofit_lens.interventions.base import Adapter, AdapterMeta
from lofit_lens.models import model_info
from tests.adapters import random_adapter

HEADS = HeadSet(["L2H1", "L0H3", "L2H0"], [0.3, 0.2, 0.1], (3, 4), "probe accuracy")
METHODS = ("lofit", "iti", "repe", "red", "loreft", "post-block", "lora", "contrast", "ablation")
METRIC = {
    "task": "organism/facts", "split": "test", "form": "", "data_hash": "ab" * 32, "metric": "accuracy", "mean": 0.75,
    "interval": [0.5, 0.875], "n": 40, "seeds": 1,
}  # fmt: skip


def unit(rows, width, generator):
    """Rows of norm 1."""
    return torch.nn.functional.normalize(torch.randn(rows, width, generator=generator), dim=1)


@torch.no_grad()
def made(method: str, model, *, seed: int = 0) -> Adapter:
    """An adapter of a method for a model of 3 layers of 4 heads; LoRA needs the bridge."""
    info, g = model_info(model), torch.Generator().manual_seed(seed)
    meta = AdapterMeta(info)
    lofit = random_adapter(model, HEADS, seed=seed)
    if method == "lofit":
        adapter = lofit
    elif method == "iti":
        adapter = ITI(
            lofit.shape,
            HEADS,
            directions=unit(3, lofit.d_head, g),
            sigma=torch.rand(3, generator=g),
            alpha=3.0,
            meta=meta,
        )
    elif method == "repe":
        adapter = RepE(unit(2, info.d_model, g), [0, 2], n_layers=3, coefficient=2.0, meta=meta)
    elif method == "red":
        adapter = Red.for_model(model, layers=[0, 2])
        adapter.s.normal_(1, 0.5, generator=g)
        adapter.b.normal_(0, 0.2, generator=g)
    elif method == "loreft":
        adapter = LoReft.for_model(model, rank=2, layers=[1, 2], seed=seed)
        adapter.W.normal_(0, 0.5, generator=g)
    elif method == "post-block":
        adapter = PostBlock.for_model(model, rank=2, f="linear", layers=[0, 2], seed=seed)
        adapter.D.normal_(0, 0.5, generator=g)
        adapter.U.normal_(0, 0.5, generator=g)
    elif method == "lora":
        adapter = Lora.for_model(model, rank=2, seed=seed)
        for B in adapter.B.values():
            B.normal_(0, 0.3, generator=g)
    elif method == "contrast":
        adapter = ContrastVectors.for_model(model, [0, 2])
    else:
        adapter = HeadAblation(
            lofit.shape, HEADS, values=torch.randn(3, lofit.d_head, generator=g), how="mean", meta=meta
        )
    adapter.meta.task, adapter.meta.data_hash, adapter.meta.seed = "organism/facts", "cd" * 32, seed
    adapter.meta.config, adapter.meta.n_train, adapter.meta.metrics = {"lr": 0.01}, 120, [METRIC]
    return adapter
