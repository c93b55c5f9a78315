"""Options that several verbs share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

LARGEST_SEED = 2**32 - 1  # of numpy and scikit-learn

Model = Annotated[str, typer.Option("--model", "-m", help="'organism' (embedded), a hub id, or a Hugging Face folder.")]
TaskName = Annotated[
    str, typer.Option("--task", "-t", help=(
        "truthfulqa, mquake, clutrr, siqa, arc_challenge, boolq, svamp, triviaqa, nq, mmlu, organism/truth|kinship|edits, "
        "or your own: a folder, or a .jsonl, .json or .csv file."
    ))
]  # fmt: skip
Column = Annotated[
    list[str] | None, typer.Option("--column", help=(
        "Of a task file: FIELD=COLUMN, e.g. prompt=question or 'answer= {label}'; may be repeated, also for one field."
    ))
]  # fmt: skip
Source = Annotated[
    str | None,
    typer.Option(
        "--source", help="files or hub: siqa, arc_challenge, boolq, svamp; files, unflagged or flagged-apart: mquake."
    ),
]
Form = Annotated[
    str | None, typer.Option("--form", help="How questions are asked: choices, binary, options, generation.")
]  # fmt: skip
AdapterName = Annotated[
    str | None, typer.Option("--adapter", "-a", help="Of any method: a folder, or user/name or user/name@revision on the hub.")
]  # fmt: skip
OtherModel = Annotated[
    bool, typer.Option("--other-model", help="Use the adapter on other weights than those it was made for.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON record on stdout, everything else on stderr.")]
Fold = Annotated[int | None, typer.Option("--fold", help="TruthfulQA's fold, 0 or 1.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder with the task's files; left out: fetched.")]
Backend = Annotated[
    str, typer.Option("--backend", help="auto, hooked (HookedTransformer) or bridge (TransformerBridge).")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="Of the frozen weights: float32, bfloat16, float16, auto (bfloat16 where it is native)."
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; left out: CUDA where there is one.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Hub commit, tag or branch of the model.")]
Seed = Annotated[int, typer.Option(
    "--seed", help="Of the init, the row order and the draw of training examples.", min=0, max=LARGEST_SEED
)]  # fmt: skip
PrependBos = Annotated[bool | None, typer.Option(
    "--prepend-bos/--no-prepend-bos", help="BOS in front of every text, or not; left out: as the model's tokenizer does it."
)]  # fmt: skip
ModelName = Annotated[
    str | None, typer.Option("--name", help="What the model is called in results; left out: its hub id or its folder's name.")
]  # fmt: skip
IsChat = Annotated[
    bool,
    typer.Option("--chat", help="Put prompts through the model's chat template; answers are the assistant's turn."),
]
System = Annotated[str | None, typer.Option("--system", help="Text of the system's turn of a chat; means --chat.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="New folder for the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
NTrain = Annotated[
    int | None, typer.Option("--n-train", help="Training examples drawn; left out: the task's own number.")
]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate; left out: the preset's.")]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the examples; left out: the preset's.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Examples a step; left out: the preset's.")]
MaxSteps = Annotated[int | None, typer.Option("--max-steps", help="Stop after so many steps, e.g. to try things out.")]
TokenBudget = Annotated[
    int | None,
    typer.Option("--token-budget", help="Padded tokens of one training pass, 8192 if left out; less needs less memory.", min=1),
]  # fmt: skip
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Gradient checkpointing: less memory for a third more time.")
]
Track = Annotated[
    str | None, typer.Option("--track", help="wandb or tensorboard reads the training's steps; files go to OUT.track.")
]  # fmt: skip


def columns_of(given: Sequence[str] | None) -> dict[str, list[str]]:
    """Field -> its columns, from texts FIELD=COLUMN.

    Raises:
        InputError: a text of another form.
    """
    from lofit_lens.errors import InputError

    found: dict[str, list[str]] = {}
    for text in given or ():
        field, _, column = text.partition("=")
        if not field or not column:
            raise InputError(f"--column {text!r} names no field and column; give e.g. --column prompt=question")
        found.setdefault(field, []).append(column)
    return found


def columns_by_task(names: Sequence[str], given: Sequence[str] | None) -> dict[str, list[str] | None]:
    """What --column says of each of several tasks: it is for those that are files.

    Raises:
        InputError: it is given, and none is a file.
    """
    from lofit_lens.errors import InputError
    from lofit_lens.tasks.files import is_task_file

    found = {name: list(given) if given and is_task_file(name) else None for name in names}
    if given and not any(found.values()):
        raise InputError(f"--column is for tasks of one file, and {', '.join(names)} are none; leave it out")
    return found
