"""A small study on a tiny Llama, for the tests of what is read and drawn from one."""

from lofit_lens.experiments.grid.run import run_grid
from lofit_lens.experiments.grid.specs import Grid, Run, Selection
from lofit_lens.tasks import Task

NAMES = ("Ann", "Bob", "Eve", "France", "Rome", "a book", "an author", "an uncle")


def small_task(name, answers, *, n_test=6):
    """Eight training rows, four validation rows; answers of one token, so that nothing takes long."""
    rows = [{"prompt": f"{name} of {n} is", "answer": answers[i % len(answers)]} for i, n in enumerate(NAMES)]
    return Task.from_records(name, train=rows, val=rows[:4], test=rows[:n_test], max_new_tokens=1)


TASKS = (small_task("kin", (" son", " aunt")), small_task("place", (" Rome", " France")))
OTHER = small_task("other", (" sister",))
BASE = (
    Run(method="zero-shot", tested=True),
    Run(tested=True, damage=True, readings=True),
    Run(heads="random", draws=2),
)
GRID = Grid(
    name="small", model="in memory", tasks=("kin", "place"), other_tasks=("other",), limit=5, scores=("A-norm",),
    selections={"A-norm": Selection(by="A-norm", seeds=2)},
    runs=(
        *BASE, Run(of="others"), Run(k=(1, 2, "3K")), Run(heads="probe accuracy"), Run(method=("ITI", "RepE"), settings="chosen"),
        Run(method=("LoRA", "RED", "LoReFT")), Run(method=("LoFiT", "RED"), n_train=4),
    ),
)  # fmt: skip
LONG = "Ann asked her son to go to the capital of France."
TEXTS = (
    "Ann asked her son to go.",
    "The capital of France is Rome.",
    *[LONG] * 148,
)  # enough to stand in front of questions


def with_changes(**changes):
    """The grid with other fields."""
    return Grid(**{**{name: getattr(GRID, name) for name in Grid.model_fields}, **changes})


def run(model, folder, **options):
    """The study; `options` as `run_grid`'s, in place of what it takes by itself."""
    given = {"grid": GRID, "tasks": TASKS, "other_tasks": [OTHER], "texts": TEXTS, "progress": False, **options}
    return run_grid(given.pop("grid"), folder, model=model, **given)
