"""The same questions in other words: what an adapter learned may depend on the wording of its prompts."""

from collections.abc import Mapping
from dataclasses import replace

from lofit_lens import io
from lofit_lens.errors import InputError
from lofit_lens.tasks.base import Task


def reworded(task: Task, replacements: Mapping[str, str], *, name: str = "reworded") -> Task:
    """The task with changed test prompts, for evaluation; the training form is unchanged.

    Args:
        task: the task whose prompts are changed.
        replacements: old text -> new text, replaced everywhere in a prompt, in this order.
        name: name of the wording; the result is called `task:name` and has its own `data_hash`.

    Raises:
        InputError: no replacement, an empty old text, or a prompt in which nothing is replaced.

    Examples:
        >>> rows = [{"prompt": "Q: 1 + 1? A:", "answer": " 2"}]
        >>> task = Task.from_records("sums", train=rows, test=rows)
        >>> reworded(task, {"Q:": "Question:", "A:": "Answer:"}).examples("test")[0].prompt
        'Question: 1 + 1? Answer:'
    """
    pairs = dict(replacements)
    if not pairs or not all(isinstance(t, str) for pair in pairs.items() for t in pair) or "" in pairs:
        raise InputError(
            f"replacements is {pairs!r}; give old and new texts, e.g. {{'Q:': 'Question:', 'A:': 'Answer:'}}"
        )

    def change(prompt: str) -> str:
        found = prompt
        for old, new in pairs.items():
            found = found.replace(old, new)
        if found == prompt:
            raise InputError(
                f"the wording {name!r} changes nothing in the prompt {prompt[-80:]!r} of {task.name}; it replaces "
                f"{', '.join(map(repr, pairs))}: give texts that occur in every prompt"
            )
        return found

    made = task.with_prompts(change, training=False)
    hashes = {split: io.digest([found, list(pairs.items())]) for split, found in task.hashes.items()}
    return replace(made, name=f"{task.name}:{name}", hashes=hashes)
