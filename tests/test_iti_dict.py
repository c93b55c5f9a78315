"""ITI dictionaries: bit-equal round trips, the shift that the reference's readers make of one, and what is refused."""

import json
import pickle

import numpy as np
import pytest
import torch

from lofit_lens import HeadSet, Lofit
from lofit_lens.errors import AdapterError, DataError, InputError
from lofit_lens.models import logits_of
from lofit_lens.sharing.iti_dict import export_iti, from_iti_dict, import_iti, to_iti_dict
from tests.adapters import output_projection
from tests.test_iti import random_iti, small

SHAPE = (3, 4, 8)
UNIT = [0.6, 0.8, 0, 0, 0, 0, 0, 0]
NAME = "model.layers.1.self_attn.head_out"
TOKENS = torch.randint(3, 400, (2, 10), generator=torch.Generator().manual_seed(3))


def by_head(iti):
    """Head -> direction and sigma, whatever the order."""
    return {h: (d.tolist(), s.item()) for h, d, s in zip(iti.heads, iti.directions, iti.sigma, strict=True)}


def test_the_dictionary_by_hand():
    """Layers in the order of the heads, heads of a layer ascending, directions as float32 arrays that are copies."""
    iti = small()  # of L2H1 L0H3 L2H0
    found = to_iti_dict(iti)
    assert list(found) == ["model.layers.2.self_attn.head_out", "model.layers.0.self_attn.head_out"]
    assert [[head for head, _, _ in entries] for entries in found.values()] == [[0, 1], [3]]
    _, direction, std = found["model.layers.0.self_attn.head_out"][0]
    assert direction.dtype == np.float32
    assert direction.tolist() == iti.directions[1].tolist()
    assert std == iti.sigma[1].item()
    direction[:] = 0
    assert iti.directions[1].any()


@pytest.mark.parametrize("through", ["dictionary", "file"])
def test_a_round_trip_is_bit_equal(tmp_path, through):
    """Directions and sigmas come back bit by bit; alpha and positions are those given."""
    iti = small()
    more = {"alpha": 2.0, "positions": "last"}
    if through == "dictionary":
        back = from_iti_dict(to_iti_dict(iti), SHAPE, **more)
    else:
        back = import_iti(export_iti(iti, tmp_path / "iti.json"), SHAPE, **more)
    assert by_head(back) == by_head(iti)
    assert (back.alpha, str(back.positions), back.shape) == (2.0, "last", SHAPE)
    assert str(back.heads) == "L2H0 L2H1 L0H3"
    assert to_iti_dict(back).keys() == to_iti_dict(iti).keys()


def test_the_file_is_the_dictionary_and_nothing_else(tmp_path):
    """The reference reads a layer out of every key, so that there is no other; a number is what it is in float64 too."""
    iti = small()
    record = json.loads(export_iti(iti, tmp_path / "iti.json").read_text())
    expected = {n: [[h, d.astype(np.float64).tolist(), s] for h, d, s in e] for n, e in to_iti_dict(iti).items()}
    assert record == expected


@torch.no_grad()
def test_the_references_readers_make_the_same_shift_of_it(loaded, hf):
    """Displacement alpha * std * direction in float64, by layer, added to W_O's input of plain Hugging Face."""
    model, plain = loaded("llama-gqa", "bridge"), hf("llama-gqa")
    iti = random_iti(model)
    n_heads, d_head = iti.shape[1:]
    handles = []
    for name, entries in to_iti_dict(iti).items():
        displacement = np.zeros((n_heads, d_head))
        for head, vector, std in entries:
            displacement[head] = iti.alpha * std * vector
        shift = torch.tensor(displacement.reshape(-1), dtype=torch.float32)
        module = output_projection(plain, int(name.split(".")[2]))
        handles.append(module.register_forward_pre_hook(lambda m, args, shift=shift: (args[0] + shift,)))
    expected = plain(TOKENS).logits
    for handle in handles:
        handle.remove()
    with iti.attached(model):
        got = logits_of(model, TOKENS, torch.ones_like(TOKENS))
    assert (got - expected).abs().max() < 1e-5
    assert (plain(TOKENS).logits - expected).abs().max() > 0.05


def test_what_the_references_code_makes_is_read():
    """Directions of float64, heads and stds of numpy, tensors too; the std in float32."""
    direction = np.array(UNIT)
    back = from_iti_dict(
        {NAME: [(np.int64(3), direction, np.float64(0.1)), (0, torch.tensor(UNIT), torch.tensor(0.25))]},
        SHAPE,
        alpha=15,
    )
    assert str(back.heads) == "L1H3 L1H0"
    assert back.directions.tolist() == [torch.tensor(UNIT).tolist()] * 2
    assert back.sigma.tolist() == torch.tensor([0.1, 0.25]).tolist()
    assert str(back.positions) == "answer"


WRONG = {
    "a key of another kind": ({"model.layers.1.self_attn.o_proj": []}, "no key of an ITI dictionary"),
    "a layer that is no number": ({"model.layers.x.self_attn.head_out": []}, "no key of an ITI dictionary"),
    "a layer with a leading zero": ({"model.layers.01.self_attn.head_out": []}, "no key of an ITI dictionary"),
    "a huge layer": ({f"model.layers.{'9' * 5000}.self_attn.head_out": []}, "no key of an ITI dictionary"),
    "no heads": ({}, "holds no head"),
    "empty lists alone": ({NAME: []}, "holds no head"),
    "no list": ({NAME: {"0": 1}}, "expected a list"),
    "a text": ({NAME: "abc"}, "expected a list"),
    "an older tuple of four": ({NAME: [[0, UNIT, 0.1, 0.2]]}, r"\[0\] is no triple"),
    "a text for a triple": ({NAME: ["abc"]}, r"\[0\] is no triple"),
    "a head twice": ({NAME: [[1, UNIT, 0.1], [1, UNIT, 0.1]]}, "L1H1 is listed twice"),
    "a head out of range": ({NAME: [[4, UNIT, 0.1]]}, "L1H4 is outside this model"),
    "a layer out of range": ({NAME.replace("1", "3"): [[0, UNIT, 0.1]]}, "L3H0 is outside this model"),
    "a negative head": ({NAME: [[-1, UNIT, 0.1]]}, "head of .* is -1; expected a whole number"),
    "a head of 1.0": ({NAME: [[1.0, UNIT, 0.1]]}, "head of .* is 1.0; expected a whole number"),
    "a head of True": ({NAME: [[True, UNIT, 0.1]]}, "head of .* is True; expected a whole number"),
    "a short direction": ({NAME: [[0, UNIT[:7], 0.1]]}, r"shape \[7\]"),
    "a nested direction": ({NAME: [[0, [UNIT], 0.1]]}, r"shape \[1, 8\]"),
    "a ragged direction": ({NAME: [[0, [[1.0], 2.0], 0.1]]}, "no table of numbers"),
    "a direction of text": ({NAME: [[0, ["1"] * 8, 0.1]]}, "expected numbers"),
    "a direction of nothing": ({NAME: [[0, [None] * 8, 0.1]]}, "expected numbers"),
    "NaN in a direction": ({NAME: [[0, [float("nan"), *UNIT[1:]], 0.1]]}, "NaN"),
    "an infinite std": ({NAME: [[0, UNIT, float("inf")]]}, "infinity"),
    "a std too large for float32": ({NAME: [[0, UNIT, 1e39]]}, "too large for float32"),
    "a number of 400 digits": ({NAME: [[0, [10**400, 1.0, *UNIT[2:]], 0.1]]}, "numbers"),
    "a negative std": ({NAME: [[0, UNIT, -0.1]]}, "sigma of head L1H0"),
    "a list for a std": ({NAME: [[0, UNIT, [0.1]]]}, r"the std of .* has shape \[1\]"),
    "a direction of norm 2": ({NAME: [[0, [2.0] + [0] * 7, 0.1]]}, "norm 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_dictionaries_are_refused(case):
    """Each with its own reason."""
    wrong, message = WRONG[case]
    with pytest.raises(InputError, match=message):
        from_iti_dict(wrong, SHAPE, alpha=15.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "empty"), ("[1, 2]", "holds list, not an object.*expected a JSON object"),
     ('{"a": ', "not JSON"), ('{"heads": []}', "no key of an ITI dictionary"),
     ('{"directions": {}, "model_type": "llama"}', "no key"), (json.dumps({NAME: [[0, UNIT]]}), "no triple")],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, text, message):
    """By name."""
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        import_iti(tmp_path / "x.json", SHAPE, alpha=15.0)
    assert "x.json" in str(caught.value)


TWICE = '{"%s": [[0, %s, 0.1]], "%s": [[1, %s, 0.1]]}' % (NAME, UNIT, NAME, UNIT)  # noqa: UP031 (braces of its own)


@pytest.mark.parametrize(
    ("text", "message"),
    [(TWICE, "twice"), ('{"%s": [[0, %s, NaN]]}' % (NAME, UNIT), "NaN"), ('{"a": %s}' % ("[" * 10**5), "recursion"),  # noqa: UP031
     ('{"%s": [[0, %s, %s]]}' % (NAME, UNIT, "9" * 5000), "digits")],  # noqa: UP031
)  # fmt: skip
def test_json_that_other_readers_take_or_choke_on_is_refused(tmp_path, text, message):
    """A key twice, whose first value would get lost; NaN; depth and digits without end."""
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=message):
        import_iti(tmp_path / "x.json", SHAPE, alpha=15.0)


def test_a_file_that_is_not_there_is_refused(tmp_path):
    """By name."""
    with pytest.raises(DataError, match=r"no file .*x\.json"):
        import_iti(tmp_path / "x.json", SHAPE, alpha=15.0)


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", ["iti.pkl", "iti.json", "iti.pt", "iti"])
def test_a_pickle_is_never_opened(tmp_path, name):
    """Whatever it is called; the code in it does not run."""
    (tmp_path / name).write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    with pytest.raises(DataError, match="never opened here"):
        import_iti(tmp_path / name, SHAPE, alpha=15.0)
    assert not (tmp_path / "ran").exists()


def test_an_archive_of_torch_or_numpy_is_never_opened(tmp_path):
    """Both hold pickles, under any name."""
    torch.save({"a": 1}, tmp_path / "torch.json")
    np.save(tmp_path / "numpy.npy", np.array([{}]), allow_pickle=True)
    (tmp_path / "numpy.npy").rename(tmp_path / "numpy.json")
    for name in ("torch.json", "numpy.json"):
        with pytest.raises(DataError, match="never opened here"):
            import_iti(tmp_path / name, SHAPE, alpha=15.0)


def test_other_methods_have_no_dictionary(tmp_path):
    """LoFiT's offsets have neither unit directions nor spreads; nothing is written."""
    with pytest.raises(AdapterError, match=r"LoFiT adapter.*export_svec"):
        export_iti(Lofit(SHAPE, HeadSet(["L1H0"])), tmp_path / "x.json")
    assert not list(tmp_path.iterdir())


def test_a_file_is_replaced_on_demand_alone(tmp_path):
    """The old one stays where nobody asked."""
    file = export_iti(small(), tmp_path / "x.json")
    before = file.read_bytes()
    other = small(heads=HeadSet(["L0H0", "L0H1", "L0H2"]))
    with pytest.raises(InputError, match="exists; give another name"):
        export_iti(other, file)
    assert file.read_bytes() == before
    assert import_iti(export_iti(other, file, overwrite=True), SHAPE, alpha=1.0).heads.layers == (0,)
