"""ITI (arXiv 2306.03341): mass-mean directions on as many heads as LoFiT, chosen by probe accuracy.

All positions are shifted, as in LoFiT. The strength alpha is chosen. A grid may give two more settings as numbers, both omitted
by default (`interventions.iti` and `probing.fit_probes` explain them):

- `answer_from`: 1 = when answers are scored, the shift begins at their first token (`"answer"`), 2 = at their second
  (`"second"`, the public code).
- `full_stop`: 1 = the probes' statements end with a full stop, 0 = they do not; omitted = as the task writes them.
"""

from lofit_lens.errors import InputError
from lofit_lens.experiments.methods.base import Fit, Method, Workbench
from lofit_lens.interventions import Intervention

STRENGTHS = (5.0, 15.0, 45.0, 135.0)
STARTS = {None: "all", 1: "answer", 2: "second"}
ENDS = {None: None, 0: False, 1: True}


def _fit(bench: Workbench, asked: Fit) -> Intervention:
    start, end = asked.settings.get("answer_from"), asked.settings.get("full_stop")
    if start not in STARTS:
        raise InputError(f"answer_from of ITI is {start:g}; give 1 or 2, or leave it out to shift all positions")
    if end not in ENDS:
        raise InputError(f"full_stop of ITI is {end:g}; give 0 or 1, or leave it out")
    probes = bench.probes(asked.seed, full_stop=ENDS[end])
    return probes.iti(asked.k or bench.preset.k, alpha=asked.settings["alpha"], positions=STARTS[start])


METHOD = Method(
    "ITI",
    _fit,
    lambda outline: tuple({"alpha": a} for a in STRENGTHS),
    settings=("alpha", "answer_from", "full_stop"),
    heads="k",
    cost=0.5,
    place=10,
)
