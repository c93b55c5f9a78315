"""The organism's tokenizer: one token per word, words separated by single spaces.

Why: with a word-level tokenizer a prompt and its answer tokenize the same apart and together, every answer is one token, and a
cue word can be swapped without moving anything. `decode(encode(text))` gives the text back.
"""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from lofit_lens.organism.world import SPECIAL, build_world


def build_tokenizer(*, max_length: int = 256) -> PreTrainedTokenizerFast:
    """Build a fast Hugging Face tokenizer over the world's vocabulary; it puts `<s>` first unless add_special_tokens=False."""
    vocabulary = {word: index for index, word in enumerate(build_world().vocabulary())}
    core = Tokenizer(WordLevel(vocabulary, unk_token=SPECIAL["unk"]))
    core.pre_tokenizer = WhitespaceSplit()
    bos = SPECIAL["bos"]
    core.post_processor = TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, vocabulary[bos])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=bos,
        eos_token=SPECIAL["eos"],
        pad_token=SPECIAL["pad"],
        unk_token=SPECIAL["unk"],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        add_bos_token=True,
    )
