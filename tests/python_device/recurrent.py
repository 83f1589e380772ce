"""The cells of LSTM and GRU, which PyTorch runs as one operator on a device, by their formulas."""

import torch
from torch import Tensor


def lstm_cell(
    of_input: Tensor, of_hidden: Tensor, cell: Tensor, bias: Tensor | None = None, hidden_bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the next hidden state and cell, and the gates for the backward."""
    gates = _sum(of_input, of_hidden, bias, hidden_bias)
    opened, forgotten, new, shown = gates.chunk(4, 1)
    opened, forgotten, new, shown = opened.sigmoid(), forgotten.sigmoid(), new.tanh(), shown.sigmoid()
    following = forgotten * cell + opened * new
    return shown * following.tanh(), following, torch.cat([opened, forgotten, new, shown], 1)


def lstm_cell_backward(  # noqa: PLR0917 - the arguments of the operator
    gradient: Tensor | None, cell_gradient: Tensor | None, cell: Tensor, following: Tensor, gates: Tensor, biased: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the gates before they are squashed, of the cell, and of a bias."""
    opened, forgotten, new, shown = gates.chunk(4, 1)
    gradient = torch.zeros_like(following) if gradient is None else gradient
    squashed = following.tanh()
    through = gradient * shown * (1 - squashed * squashed)
    through = through if cell_gradient is None else through + cell_gradient
    of_gates = [
        through * new * opened * (1 - opened),
        through * cell * forgotten * (1 - forgotten),
        through * opened * (1 - new * new),
        gradient * squashed * shown * (1 - shown),
    ]
    joined = torch.cat(of_gates, 1)
    return joined, through * forgotten, joined.sum(0) if biased else joined.new_empty(0)


def gru_cell(
    of_input: Tensor, of_hidden: Tensor, hidden: Tensor, bias: Tensor | None = None, hidden_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the next hidden state, and what the backward needs."""
    reset, kept, new = _sum(of_input, bias).chunk(3, 1)
    hidden_reset, hidden_kept, hidden_new = _sum(of_hidden, hidden_bias).chunk(3, 1)
    reset, kept = (reset + hidden_reset).sigmoid(), (kept + hidden_kept).sigmoid()
    new = (new + reset * hidden_new).tanh()
    return new + kept * (hidden - new), torch.cat([reset, kept, new, hidden_new, hidden], 1)


def gru_cell_backward(gradient: Tensor, saved: Tensor, biased: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the gates of the input and of the hidden state, of that state, and of both biases."""
    reset, kept, new, hidden_new, hidden = saved.chunk(5, 1)
    of_new = gradient * (1 - kept) * (1 - new * new)
    of_kept = gradient * (hidden - new) * kept * (1 - kept)
    of_reset = of_new * hidden_new * reset * (1 - reset)
    of_input = torch.cat([of_reset, of_kept, of_new], 1)
    of_hidden = torch.cat([of_reset, of_kept, of_new * reset], 1)
    biases = (of_input.sum(0), of_hidden.sum(0)) if biased else (of_input.new_empty(0), of_hidden.new_empty(0))
    return of_input, of_hidden, gradient * kept, *biases


def _sum(first: Tensor, *others: Tensor | None) -> Tensor:
    return sum((other for other in others if other is not None), first)


KERNELS = {
    "_thnn_fused_lstm_cell": lstm_cell,
    "_thnn_fused_lstm_cell_backward_impl": lstm_cell_backward,
    "_thnn_fused_gru_cell": gru_cell,
    "_thnn_fused_gru_cell_backward": gru_cell_backward,
}
"""By the name of the operator."""
