"""Check that a loaded model is the same model: compare its logits with plain Hugging Face's on a few random tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lofit_lens.errors import ModelError
from lofit_lens.hub import first_line
from lofit_lens.models.hooks import frozen
from lofit_lens.models.info import WINDOWS, device_of, quantization_of
from lofit_lens.models.running import FLOAT16_ENDS, logits_of

PROBE = 12  # random tokens on which a class is compared with Hugging Face; more where a sliding window is short
LONGEST_PROBE = 128
GAP = 3  # padded positions


@dataclass(frozen=True)
class Probe:
    """A few random tokens, and plain Hugging Face's logits on them."""

    tokens: Tensor
    expected: Tensor
    bound: float

    @classmethod
    def of(cls, hf: Any, config: Any, dtype: torch.dtype) -> "Probe":
        """Run the model before TransformerLens takes it over; `dtype` is the one it will have afterwards.

        Raises:
            ModelError: the model cannot run, or gives logits that are not finite.
        """
        text = config.get_text_config()
        windows = [getattr(text, n, None) for n in WINDOWS]
        n = max([PROBE, *(w + 4 for w in windows if isinstance(w, int) and w + 4 <= LONGEST_PROBE)])
        tokens = torch.randint(0, int(text.vocab_size), (1, n), generator=torch.Generator().manual_seed(0))
        first = next(hf.parameters())
        try:
            with torch.no_grad(), frozen(hf):
                expected = hf(tokens.to(first.device), use_cache=False).logits.float().cpu()
        except Exception as e:
            raise ModelError(f"plain Hugging Face cannot run this model: {first_line(e)}") from e
        if not torch.isfinite(expected).all():
            why = FLOAT16_ENDS if first.dtype == torch.float16 else "its weights may be damaged; fetch it again"
            raise ModelError(f"plain Hugging Face gives logits that are not finite with this model: {why}")
        if quantization_of(hf) is not None:
            return cls(tokens, expected, max(5e-2, 2 * _own_change(hf, tokens, expected)))
        return cls(tokens, expected, 1e-3 if {first.dtype, dtype} <= {torch.float32, torch.float64} else 5e-2)

    def check(self, model: Any) -> None:
        """Raise ModelError if a class gives other logits, so that a failed conversion is refused, not returned.

        The pass uses a mask, as all passes here do: the tokens twice in one batch, padded on the right and on the left.
        """
        n, device = self.tokens.shape[1], device_of(model)
        rows, mask = torch.zeros(2, n + GAP, dtype=torch.long), torch.zeros(2, n + GAP, dtype=torch.long)
        sides = {"right": slice(0, n), "left": slice(GAP, n + GAP)}
        for row, at in enumerate(sides.values()):
            rows[row, at], mask[row, at] = self.tokens[0], 1
        with torch.no_grad():
            got = logits_of(model, rows.to(device), mask.to(device)).cpu()[..., : self.expected.shape[-1]]
        scale = self.expected.abs().max().clamp(min=1.0)
        for row, (side, at) in enumerate(sides.items()):
            error = ((got[row, at].float() - self.expected[0]).abs().max() / scale).item()
            if not error <= self.bound:
                said = f"by {error:.2g} of their size on a probe padded on the {side}"
                if got.dtype == torch.float64 and not torch.isfinite(got).all():
                    said += " (attention overflows at padding in float64); load it with dtype='float32'"
                raise ModelError(f"its logits differ from the Hugging Face model's {said}")


@torch.no_grad()
def _own_change(hf: Any, tokens: Tensor, expected: Tensor) -> float:
    """Return the relative change of a quantized model's own logits when padding runs in the same pass.

    LLM.int8 decides which columns are outliers from all tokens of a pass.
    """
    rows = torch.nn.functional.pad(tokens, (0, GAP)).repeat(2, 1)
    mask = torch.nn.functional.pad(torch.ones_like(tokens), (0, GAP)).repeat(2, 1)
    device = next(hf.parameters()).device
    with frozen(hf):
        padded = hf(rows.to(device), attention_mask=mask.to(device), use_cache=False).logits[:, : tokens.shape[1]]
    return float((padded.float().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1.0))
