"""The embedded model, end to end: runs, their folders, and the findings it was built to show."""

import pytest
import torch

import lofit_lens as ll
from lofit_lens.experiments import organism as organism_grid
from lofit_lens.experiments.grid import run_grid
from lofit_lens.experiments.organism import Cell, cue_patching, planted, run_cell, run_demo
from lofit_lens.experiments.results import load_results
from lofit_lens.experiments.specs import Grid, Run
from lofit_lens.experiments.store import Store
from lofit_lens.heads import HeadScores
from lofit_lens.models import ORGANISM, hooked, logits_of
from lofit_lens.organism.words import TASKS
from lofit_lens.organism.world import rows, with_cue
from tests.conftest import needs_hooked


@pytest.fixture(scope="module")
def organism():
    return ll.load_model("organism", device="cpu")


def test_organism_is_small_and_says_what_is_planted():
    """At most 5 MB in the package; three different heads a task, all inside the model."""
    assert sum(f.stat().st_size for f in ORGANISM.iterdir()) <= 5_000_000
    plant = planted(ORGANISM)
    assert set(plant) == set(TASKS)
    heads = [h for s in plant.values() for h in s]
    assert len(heads) == len(set(heads)) == 9


@needs_hooked
def test_organism_is_the_same_on_both_classes():
    """Equal logits to 1e-5 of their largest on HookedTransformer and TransformerBridge, at a length of 200 tokens too."""
    tokens = torch.randint(4, 500, (2, 200), generator=torch.Generator().manual_seed(0))
    logits = [
        ll.models.logits_of(ll.load_model("organism", backend=b, device="cpu"), tokens, torch.ones_like(tokens))
        for b in ("hooked", "bridge")
    ]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5 * logits[0].abs().max().item(), rtol=0)


@pytest.mark.parametrize("task", TASKS)
def test_organism_tasks(organism, task):
    """150 training examples; the bare model is wrong on neutral prompts most of the time."""
    loaded = ll.load_task(f"organism/{task}")
    assert len(loaded.training_examples()) == 150
    assert ll.evaluate(organism, loaded, progress=False).main < 0.4


def test_organism_pairs_are_true_against_popular():
    """A training pair prefers the true value over the first false one; the test form asks for the same."""
    task = ll.load_task("organism/truth")
    for pair, choice in zip(task.training["train"], task.test["train"], strict=True):
        assert (pair.prompt, pair.chosen, pair.rejected) == (choice.prompt, choice.best, choice.false[0])
        assert pair.chosen in choice.true
        assert pair.rejected not in choice.true


@pytest.mark.slow
def test_run_is_a_folder_and_repeats_to_the_byte(tmp_path):
    """One run of the grid: its folder, what stands in it, and the same bytes when it is run again."""
    cell = Cell("organism", "auto", "kinship", "random heads", 0)
    first, _ = run_cell(cell, tmp_path / "a")
    second, _ = run_cell(cell, tmp_path / "b")
    stores = [Store(tmp_path / x) for x in "ab"]
    assert stores[0].names() == stores[1].names()
    (run,) = stores[0].names()
    assert run.startswith("organism_kinship_random_heads_0-")
    for name in ("items.jsonl", "adapter/adapter_model.safetensors", "result.json", "run.json"):
        assert (stores[0].folder(run) / name).read_bytes() == (stores[1].folder(run) / name).read_bytes()
    record = stores[0].read(run)
    assert record["result"]["metrics"]["em"]["mean"] == first["value"] == second["value"]
    assert record["spec"]["data_hash"] == ll.load_task("organism/kinship").data_hash


@pytest.mark.slow
def test_patching_finds_planted_heads(organism):
    """Causal check of the planted truth: moving one head's z from the good cue to the neutral prompt."""
    effect = cue_patching(organism, "kinship")
    assert max(effect.rank(h) for h in planted(ORGANISM)["kinship"]) <= 6


@pytest.mark.slow
@torch.no_grad()
def test_patching_moves_the_one_head(organism):
    """The effect of L1H13, computed here with hooks of its own: only its z comes from the good-cue prompt."""
    listed, tokenizer = rows("kinship", "val"), organism.tokenizer
    answers = torch.tensor([tokenizer(r["answer"], add_special_tokens=False)["input_ids"][0] for r in listed])
    point = organism.hook_dict["blocks.1.attn.hook_z"]

    def last_log_prob(prompts, hook):
        found = []
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
            with hooked(point, hook(len(found))):
                found.append(logits_of(organism, ids, torch.ones_like(ids))[0, -1].log_softmax(-1)[answer])
        return torch.stack(found)

    good = [with_cue("kinship", r, "good")["prompt"] for r in listed]
    neutral = [r["prompt"] for r in listed]
    donors = []
    last_log_prob(good, lambda i: lambda z, hook: donors.append(z[:, :, 13].clone()))

    def swap(i):
        def patch(z, hook):
            z = z.clone()
            z[:, :, 13] = donors[i]
            return z

        return patch

    change = (last_log_prob(neutral, swap) - last_log_prob(neutral, lambda i: lambda z, hook: None)).mean().item()
    assert cue_patching(organism, "kinship")["L1H13"] == pytest.approx(change, abs=1e-4)
    assert change > 0.1


@pytest.mark.slow
def test_findings_of_the_embedded_model(tmp_path):
    """The promised picture: LoFiT far above zero-shot and random heads, own heads above others', planted heads found."""
    tasks = [f"organism/{t}" for t in TASKS]
    runs = [Run(method="zero-shot"), Run(), Run(of="others"), Run(heads="random", draws=2)]
    grid = Grid(name="findings", model="organism", tasks=tasks, seeds=0, batch_size=64, runs=runs)
    assert len(run_grid(grid, tmp_path, progress=False).computed) == 3 * (1 + 1 + 1 + 2 + 2)
    found = load_results(tmp_path)
    own, others, ranks = [], [], []
    for short, task in zip(TASKS, tasks, strict=True):
        chosen = found.lofit(task)["value"].mean()
        assert chosen - found.zero_shot(task)["value"].mean() >= 0.50, task
        assert chosen - found.by_chance(task)["value"].mean() >= 0.15, task
        own.append(chosen)
        others += [found.lofit(task, source=o)["value"].mean() for o in tasks if o != task]
        ranks += [found.scores[task, "A-norm", 0].rank(head) for head in planted(ORGANISM)[short]]
    assert sum(own) / len(own) - sum(others) / len(others) >= 0.10
    assert sum(rank <= 6 for rank in ranks) / len(ranks) >= 0.60


def test_the_demo_runs_its_cells(monkeypatch):
    """Own and all heads for every seed, random heads once a draw, zero-shot once; with `full` other tasks' heads: one table."""
    value = {"zero-shot": 0.1, "LoFiT heads": 0.9, "random heads": 0.4, "all heads": 0.8}

    def fake(cell, out):
        scores = torch.arange(96.0).view(6, 16).tolist() if cell.method == "LoFiT heads" else None
        right = round(10 * value.get(cell.method, 0.5))
        return {
            "task": cell.task, "method": cell.method, "seed": cell.seed, "draw": cell.draw, "metric": "em",
            "value": right / 10, "low": 0.0, "high": 1.0, "n_items": 10, "heads": "L5H15", "seconds": 0.0,
            "items": [1.0] * right + [0.0] * (10 - right),
        }, scores  # fmt: skip

    monkeypatch.setattr(organism_grid, "run_cell", fake)
    monkeypatch.setattr(organism_grid, "cue_patching", lambda model, task: HeadScores(torch.zeros(6, 16)))
    found = run_demo(seeds=(0, 1), full=True, draws=3, progress=False)
    assert len(found.runs) == 3 * (1 + 2 + 2 + 3) + 3 * 2 * 2
    table = found.table().set_index(["task", "method"])
    for task in TASKS:
        assert {m: table.loc[(task, m), "mean"] for m in value} == pytest.approx(value)
        assert table.loc[(task, "random heads"), "count"] == 3
        assert table.loc[(task, f"heads of {next(t for t in TASKS if t != task)}"), "count"] == 2
    assert list(found.runs["task"].drop_duplicates()) == list(TASKS)
    ranks = found.ranks()
    assert len(ranks) == 9
    assert {"A-norm, seed 0", "A-norm, seed 1", "patching"} <= set(ranks.columns)
