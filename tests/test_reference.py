"""Checkpoints with the official code's key names, made on the spot: the same logits as its formula, and what is refused."""

import json
import logging
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lofit_lens import HeadSet
from lofit_lens.errors import DataError, InputError, ModelError
from lofit_lens.models import load_model, logits_of
from lofit_lens.sharing.reference import import_lofit
from tests import tiny
from tests.adapters import output_projection


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


TOKENS = torch.randint(3, 400, (2, 10), generator=torch.Generator().manual_seed(3))
TUNED = ((2, 1), (0, 3), (2, 0))


def size(architecture):
    """Layers, heads and d_head."""
    config = tiny.configs()[architecture]
    return 3, 4, config.head_dim


def official(folder, architecture="llama", *, A=(), v=TUNED, dtype=torch.float32, files=1, change=None):
    """A checkpoint as the official trainer leaves it: A and v of every head, 0 but on the heads listed. Returns both."""
    tiny.save(folder, architecture)
    n_layers, n_heads, d_head = size(architecture)
    generator = torch.Generator().manual_seed(7)
    made = {}
    for letter, heads in (("A", A), ("v", v)):
        grid = torch.zeros(n_layers, n_heads, d_head)
        for head in heads:
            grid[head] = 0.5 * torch.randn(d_head, generator=generator)
        made[letter] = grid.to(dtype)
    extra = {
        f"model.layers.{i}.self_attn.attn_{letter}.{j}": grid[i, j].clone()
        for letter, grid in made.items() for i in range(n_layers) for j in range(n_heads)
    }  # fmt: skip
    if change is not None:
        change(extra)
    whole = load_file(folder / "model.safetensors") | extra
    if files == 1:
        save_file(whole, folder / "model.safetensors", {"format": "pt"})
    else:
        (folder / "model.safetensors").unlink()
        where = {name: f"model-{i % files + 1:05}-of-{files:05}.safetensors" for i, name in enumerate(sorted(whole))}
        for file in set(where.values()):
            save_file({n: whole[n] for n, at in where.items() if at == file}, folder / file, {"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return made["A"], made["v"]


@torch.no_grad()
def by_the_formula(plain, A, v):
    """Logits of plain Hugging Face with every head's slice of W_O's input multiplied by A + 1, plus v."""
    handles = []
    for layer in range(A.shape[0]):

        def hook(module, args, layer=layer):
            out = args[0].clone()
            for i in range(A.shape[1]):
                part = slice(i * A.shape[2], (i + 1) * A.shape[2])
                out[:, :, part] = out[:, :, part] * (A[layer, i] + 1) + v[layer, i]
            return (out,)

        handles.append(output_projection(plain, layer).register_forward_pre_hook(hook))
    logits = plain(TOKENS).logits
    for handle in handles:
        handle.remove()
    return logits


EVERY = tuple((i, j) for i in range(3) for j in range(4))


@pytest.mark.parametrize("architecture", ["llama", "llama-gqa", "gemma"])
@pytest.mark.parametrize(("A", "v"), [((), TUNED), (EVERY, ()), (TUNED, TUNED)], ids=["tuned", "selecting", "both"])
@torch.no_grad()
def test_the_logits_are_those_of_the_formula(loaded, hf, tmp_path, architecture, A, v):
    """After either step, on the model that it was tuned from: z * (1 + A) + v written straight on plain Hugging Face."""
    A, v = official(tmp_path / "c", architecture, A=A, v=v)
    lofit = import_lofit(tmp_path / "c")
    model, plain = loaded(architecture, "bridge"), hf(architecture)
    with lofit.attached(model):
        got = logits_of(model, TOKENS, torch.ones_like(TOKENS))
    expected = by_the_formula(plain, A, v)
    assert (got - expected).abs().max() < 1e-5
    assert (plain(TOKENS).logits - expected).abs().max() > 0.05


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_tensors_are_bit_equal(tmp_path, files, dtype):
    """One file or several, half precision into float32 without loss; heads are those not all 0, by layer."""
    A, v = official(tmp_path / "c", A=((1, 2),), files=files, dtype=dtype)
    lofit = import_lofit(tmp_path / "c")
    assert torch.equal(lofit.A, A.float())
    assert torch.equal(lofit.v, v.float())
    assert str(lofit.heads) == "L0H3 L1H2 L2H0 L2H1"
    assert lofit.meta.model is None
    assert lofit.meta.config["made_by"] == "lo-fit checkpoint"


def test_the_base_in_the_checkpoint_takes_the_adapter(tmp_path):
    """The whole folder loads as a model too, and the adapter fits it."""
    official(tmp_path / "c")
    model = load_model(tmp_path / "c", backend="bridge", device="cpu")
    with import_lofit(tmp_path / "c").attached(model):
        pass


def test_heads_come_from_a_head_file(tmp_path, caplog):
    """In its order, with its scores; numbers on other heads are left out and that is said."""
    _, v = official(tmp_path / "c")
    np.save(tmp_path / "top.npy", np.array([[2, 0], [2, 1], [1, 1]]))
    heads = HeadSet.from_npy(tmp_path / "top.npy")
    with caplog.at_level(logging.WARNING, "lofit_lens"):
        lofit = import_lofit(tmp_path / "c", heads=heads)
    assert str(lofit.heads) == "L2H0 L2H1 L1H1"
    assert "numbers of 1 heads outside `heads` are left out, e.g. L0H3" in caplog.text
    assert torch.equal(lofit.v[2], v[2])
    assert not lofit.v[0].any()
    with pytest.raises(InputError, match="L3H0 is outside this model"):
        import_lofit(tmp_path / "c", heads=HeadSet(["L3H0"]))


def test_a_head_file_of_another_run_is_refused(tmp_path):
    """Where it names no head that was tuned; those that were are told."""
    official(tmp_path / "c")
    with pytest.raises(
        ModelError, match=r"none of the given heads was tuned, but L0H3, L2H0, L2H1; give the head file"
    ):
        import_lofit(tmp_path / "c", heads=HeadSet(["L1H1", "L0H2"]))


KEY = "model.layers.1.self_attn.attn_v.2"
WRONG = {
    "missing": (lambda x: x.pop(KEY), "attn_v of L1H2 is missing"),
    "a head too many": (lambda x: x.update({KEY[:-1] + "4": torch.zeros(8)}), "attn_v of L1H4 is outside the model"),
    "a layer too many": (lambda x: x.update({KEY.replace("1", "3"): torch.zeros(8)}), "attn_v of L3H2 is outside"),
    "longer": (lambda x: x.update({KEY: torch.zeros(9)}), r"attn_v\.2 has shape \[9\]"),
    "two-dimensional": (lambda x: x.update({KEY: torch.zeros(1, 8)}), r"attn_v\.2 has shape \[1, 8\]"),
    "NaN": (lambda x: x.update({KEY: torch.full((8,), torch.nan)}), r"attn_v\.2 holds NaN"),
    "too large": (lambda x: x.update({KEY: torch.full((8,), 1e39, dtype=torch.float64)}), "too large for float32"),
    "no v": (lambda x: [x.pop(n) for n in list(x) if "attn_v" in n], "holds no tensor .*attn_v"),
    "neither": (lambda x: x.clear(), "holds no tensor .*attn_A.* not a checkpoint of the official code"),
    "all 0": (lambda x: [t.zero_() for t in x.values()], "no head was tuned"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_tensors_are_refused(tmp_path, case):
    """By name."""
    change, message = WRONG[case]
    official(tmp_path / "c", change=change)
    with pytest.raises((ModelError, DataError), match=message):
        import_lofit(tmp_path / "c")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_hidden_layers": 2}, "L2H0 is outside the model"), ({"num_hidden_layers": 10**9}, "L3H0 is missing"),
     ({"num_attention_heads": 5}, "L0H4 is missing"), ({"head_dim": 4}, r"has shape \[8\].*\[4\]"),
     ({"num_attention_heads": None}, "does not give whole numbers"), ({"num_hidden_layers": "3"}, "does not give whole"),
     ({"head_dim": "8"}, "does not give whole numbers"), ({"num_attention_heads": 0}, "does not give whole numbers")],
)  # fmt: skip
def test_a_configuration_that_does_not_match_is_refused(tmp_path, change, message):
    """Heads and sizes are the configuration's, checked against the tensors."""
    official(tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((ModelError, DataError), match=message):
        import_lofit(tmp_path / "c")


def test_d_head_is_d_model_by_heads_where_nothing_says_it(tmp_path):
    """As for Llama-2, whose configuration has no head_dim: 32 / 4 = 8."""
    official(tmp_path / "c")
    path = tmp_path / "c" / "config.json"
    path.write_text(json.dumps({k: x for k, x in json.loads(path.read_text()).items() if k != "head_dim"}))
    assert import_lofit(tmp_path / "c").shape == (3, 4, 8)


def test_pickled_weights_are_never_opened(tmp_path):
    """The trap in them does not run; the message says what to do."""
    tiny.save(tmp_path / "c")
    (tmp_path / "c" / "model.safetensors").unlink()
    (tmp_path / "c" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(ModelError, match=r"pickled weights \(pytorch_model.bin\).*safe_serialization=True"):
        import_lofit(tmp_path / "c")
    assert not (tmp_path / "ran").exists()
