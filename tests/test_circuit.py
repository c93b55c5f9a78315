"""Head scores in the node format of MIB's circuit track: every node under its name, scores of heads alone, and refusals."""

import json
import re

import pytest
import torch

import lofit_lens as ll
from lofit_lens.errors import InputError

VALUES = torch.tensor([[0.5, -1.25, 3.0, 0.1], [2.0, 0.0, 0.75, 1 / 3], [0.3, 4.0, 0.2, 0.9]], dtype=torch.float64)
SCORES = ll.HeadScores(VALUES, "A-norm")


def test_heads_carry_their_scores_and_the_other_nodes_none(llama, tmp_path):
    """A node with a score is taken out of small circuits: an MLP with score 0 would be, one without stays."""
    file = ll.export_circuit(SCORES, tmp_path / "circuit.json", llama)
    record = json.loads(file.read_text())
    assert record["cfg"] == {"n_layers": 3, "n_heads": 4, "parallel_attn_mlp": False, "d_model": 32}
    assert record["edges"] == {}
    scored = {name: node["score"] for name, node in record["nodes"].items() if "score" in node}
    assert scored == {f"a{layer}.h{head}": VALUES[layer, head].item() for layer in range(3) for head in range(4)}
    assert set(record["nodes"]) - set(scored) == {"input", "m0", "m1", "m2", "logits"}
    assert all(node["in_graph"] is True for node in record["nodes"].values())


def test_attention_beside_the_mlp_is_said(loaded, backend, tmp_path):
    model = loaded("pythia", backend)
    shape = ll.model_info(model).grid
    file = ll.export_circuit(ll.HeadScores(torch.zeros(tuple(shape))), tmp_path / "circuit.json", model)
    assert json.loads(file.read_text())["cfg"]["parallel_attn_mlp"] is True


def test_what_cannot_be_a_circuit_is_refused(loaded, tmp_path):
    model = loaded("llama", "hooked")
    other = ll.HeadScores(torch.zeros(3, 5))
    with pytest.raises(InputError, match=re.escape("the scores are of 3 layers x 5 heads")):
        ll.export_circuit(other, tmp_path / "a.json", model)
    with pytest.raises(InputError, match=re.escape("has heads in 2 of 3 layers")):
        ll.export_circuit(ll.HeadScores(VALUES, layers=[0, 2]), tmp_path / "a.json", model)
    with pytest.raises(InputError, match=re.escape("name it")):
        ll.export_circuit(SCORES, tmp_path / "a.pt", model)
    file = ll.export_circuit(SCORES, tmp_path / "a.json", model)
    with pytest.raises(InputError, match="exists"):
        ll.export_circuit(other, file, model)
    changed = ll.HeadScores(VALUES + 1)
    ll.export_circuit(changed, file, model, overwrite=True)
    assert json.loads(file.read_text())["nodes"]["a0.h0"]["score"] == 1.5
