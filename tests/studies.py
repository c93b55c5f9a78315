"""A small study on a tiny Llama, for the tests of what is read and drawn from one."""

from lofit_lens.analysis.readings import run_readings
from lofit_lens.experiments.plan import PARTS, Plan
from lofit_lens.experiments.study import run_study
from lofit_lens.tasks import Task

NAMES = ("Ann", "Bob", "Eve", "France", "Rome", "a book", "an author", "an uncle")


def small_task(name, answers, *, n_test=6):
    """Eight training rows, four validation rows; answers of one token, so that nothing takes long."""
    rows = [{"prompt": f"{name} of {n} is", "answer": answers[i % len(answers)]} for i, n in enumerate(NAMES)]
    return Task.from_records(name, train=rows, val=rows[:4], test=rows[:n_test], max_new_tokens=1)


TASKS = (small_task("kin", (" son", " aunt")), small_task("place", (" Rome", " France")))
OTHER = small_task("other", (" sister",))
PLAN = Plan(
    seeds=(0, 1), extra_seeds=(2,), parts=PARTS, selectors=("probe accuracy",), scored=(), trained=("RED",), ks=(1, 2),
    sizes=(4,), draws=2, limit=5,
)  # fmt: skip
TEXTS = ("Ann asked her son to go.", "The capital of France is Rome.")


def run(model, folder, **options):
    """The study; `options` as `run_study`'s, in place of what it takes by itself."""
    given = {"plan": PLAN, "other_tasks": [OTHER], "texts": TEXTS, "progress": False, **options}
    return run_study(model, TASKS, out=folder, **given)


def read(model, folder, **options):
    """What is read from the study's adapters; `options` as `run_readings`'."""
    given = {"other_tasks": [OTHER], "texts": ["Ann asked her son to go to the capital of France."] * 150, "draws": 2}
    return run_readings(model, TASKS, out=folder, progress=False, **given, **options)
