"""Rows of the tasks as the public files and the hub write them."""

import json

PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)


def row(question="Who?", options=("Ann", "Bob", "Cy"), right=2, **changes):
    """One row of a multiple-choice instruction file, as those files write it."""
    names = [f"answer{i + 1}" for i in range(len(options))]
    said = " ".join(f"Answer{i + 1}: {option}" for i, option in enumerate(options))
    return {
        "instruction": f"Please choose the correct answer to the question: {question}\n\n{said}\n\nAnswer format: "
        + "/".join(names),
        "input": "", "output": f"the correct answer is answer{right}", "answer": f"answer{right}", **changes,
    }  # fmt: skip


def words_task(folder):
    """A task folder of twelve rows to train on and to test: 3 steps an epoch in batches of 4."""
    folder.mkdir()
    rows = [{"prompt": f"word {i}:", "answer": f" {'yes' if i % 2 else 'no'}"} for i in range(12)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


BOOLQ = {
    "instruction": "Please answer the following question with true or false, question: is it?\n\nAnswer format: true/false",
    "output": "the correct answer is false", "answer": "false",
}  # fmt: skip
SVAMP = {
    "instruction": "Ann has 4 pens. How many pens has Ann?",
    "output": "\nA: She has 4. The answer is 4.",
    "answer": "4.0",
}
HUB = {
    "siqa": {"context": "Ann ran.", "question": "Why?", "answerA": "late", "answerB": "fun", "answerC": "rain", "label": "2"},
    "arc_challenge": {
        "id": "x", "question": "What falls?", "choices": {"text": ["rain", "fire"], "label": ["A", "B"]}, "answerKey": "A",
    },
    "boolq": {"question": "is water wet", "answer": True, "passage": "left out"},
    "svamp": {"Body": "Ann has 4 pens", "Question": "How many pens has Ann?", "Answer": "4.0", "Equation": "4"},
}  # fmt: skip
KNOWLEDGE = {
    "triviaqa": {"question": "Who wrote it?", "answer": {"value": "Bo Diddley", "aliases": ["Ellas Otha Bates"]}},
    "nq": {"question": "who wrote it", "answer": ["Bo Diddley", "Bates"]},
    "mmlu": {
        "question": " What falls? ", "subject": "high_school_physics", "choices": ["rain", "fire", "air", "no"], "answer": 0,
    },
}  # fmt: skip


def write(folder, **splits):
    """One .json file a split; returns the folder."""
    for split, rows in splits.items():
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return folder
