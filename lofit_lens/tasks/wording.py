"""The same questions in other words: what an adapter learned may hang on the wording of its prompts."""

from collections.abc import Mapping
from dataclasses import replace

from lofit_lens import io
from lofit_lens.errors import InputError
from lofit_lens.tasks.base import Task


def reworded(task: Task, replacements: Mapping[str, str], *, name: str = "reworded") -> Task:
    """The task with its test prompts changed, for evaluation; the training form stays as it is.

    Args:
        task: whose prompts are changed.
        replacements: old text -> new text, replaced everywhere in a prompt, in this order.
        name: of the wording; the task is called `task:name` and has a `data_hash` of its own.

    Raises:
        InputError: no replacement, an old text that is empty, or a prompt in which nothing is replaced.

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
                f"{', '.join(map(repr, pairs))}: give texts that every prompt holds"
            )
        return found

    made = task.with_prompts(change, training=False)
    hashes = {split: io.digest([found, list(pairs.items())]) for split, found in task.hashes.items()}
    return replace(made, name=f"{task.name}:{name}", hashes=hashes)
