"""Options that several verbs share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

LARGEST_SEED = 2**32 - 1  # the limit of numpy and scikit-learn

Model = Annotated[str, typer.Option("--model", "-m", help="'organism' (embedded), a hub id, or a Hugging Face folder.")]
TaskName = Annotated[
    str, typer.Option("--task", "-t", help=(
        "truthfulqa, mquake, clutrr, siqa, arc_challenge, boolq, svamp, triviaqa, nq, mmlu, organism/truth|kinship|edits, "
        "or your own: a folder, or a .jsonl, .json or .csv file."
    ))
]  # fmt: skip
Column = Annotated[
    list[str] | None, typer.Option("--column", help=(
        "For a task file: FIELD=COLUMN, e.g. prompt=question or 'answer= {label}'; may be repeated, also for one field."
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
    str | None, typer.Option("--adapter", "-a", help="Adapter folder of any method, or user/name[@revision] on the hub.")
]  # fmt: skip
OtherModel = Annotated[
    bool, typer.Option("--other-model", help="Use the adapter on other weights than those it was made for.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON record on stdout, everything else on stderr.")]
Fold = Annotated[int | None, typer.Option("--fold", help="TruthfulQA's fold, 0 or 1.")]
DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder with the task's files; default: fetched.")]
Backend = Annotated[
    str, typer.Option("--backend", help="auto, hooked (HookedTransformer) or bridge (TransformerBridge).")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="Dtype of the frozen weights: float32, bfloat16, float16, auto (bfloat16 if it is native)."
    ),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; default: CUDA if available.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Hub commit, tag or branch of the model.")]
Seed = Annotated[int, typer.Option(
    "--seed", help="Seed of the init, the row order and the draw of training examples.", min=0, max=LARGEST_SEED
)]  # fmt: skip
PrependBos = Annotated[bool | None, typer.Option(
    "--prepend-bos/--no-prepend-bos", help="Whether to prepend BOS to every text; default: as the model's tokenizer does."
)]  # fmt: skip
ModelName = Annotated[
    str | None, typer.Option("--name", help="Name of the model in results; default: its hub id or its folder's name.")
]  # fmt: skip
IsChat = Annotated[
    bool,
    typer.Option("--chat", help="Put prompts through the model's chat template; answers are the assistant's turn."),
]
System = Annotated[str | None, typer.Option("--system", help="System prompt of a chat; implies --chat.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="New folder for the result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
NTrain = Annotated[
    int | None, typer.Option("--n-train", help="Number of training examples drawn; default: the task's own.")
]
LearningRate = Annotated[float | None, typer.Option("--lr", help="Learning rate; default: the preset's.")]
Epochs = Annotated[int | None, typer.Option("--epochs", help="Passes over the examples; default: the preset's.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Examples per step; default: the preset's.")]
MaxSteps = Annotated[
    int | None, typer.Option("--max-steps", help="Stop after this many steps, e.g. to try things out.")
]
TokenBudget = Annotated[
    int | None,
    typer.Option("--token-budget", help="Padded tokens per training pass; default: 8192. Fewer need less memory.", min=1),
]  # fmt: skip
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="Gradient checkpointing: less memory for a third more time.")
]
Track = Annotated[
    str | None, typer.Option("--track", help="Track training: wandb or tensorboard; files go to OUT.track.")
]  # fmt: skip


def columns_of(given: Sequence[str] | None) -> dict[str, list[str]]:
    """Field -> its columns, from texts FIELD=COLUMN.

    Raises:
        InputError: a text not of this form.
    """
    from lofit_lens.errors import InputError

    found: dict[str, list[str]] = {}
    for text in given or ():
        field, _, column = text.partition("=")
        if not field or not column:
            raise InputError(f"--column {text!r} is not FIELD=COLUMN; give e.g. --column prompt=question")
        found.setdefault(field, []).append(column)
    return found


def columns_by_task(names: Sequence[str], given: Sequence[str] | None) -> dict[str, list[str] | None]:
    """The columns of each task: --column applies to those that are files.

    Raises:
        InputError: --column is given, but no task is a file.
    """
    from lofit_lens.errors import InputError
    from lofit_lens.tasks.files import is_task_file

    found = {name: list(given) if given and is_task_file(name) else None for name in names}
    if given and not any(found.values()):
        raise InputError(f"--column is for tasks in one file, but none of {', '.join(names)} is a file; leave it out")
    return found
