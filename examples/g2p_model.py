"""The grapheme-to-phoneme model, on rnnkern's modules or on torch's own with attention in plain torch operations."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from rnnkern.seq2seq import Decoder, Encoder, Seq2Seq

MODULES = ("rnnkern", "torch")


def build_model(
    letters: int,
    phones: int,
    *,
    cell: str,
    attention: str,
    embedding_size: int,
    hidden_size: int,
    encoder_size: int,
    encoder_layers: int,
    decoder_layers: int,
    dropout: float,
    seed: int,
    modules: str = "rnnkern",
) -> Seq2Seq:
    """Builds the model with weights drawn from the seed: the same weights for both kinds of modules.

    The encoder reads in both directions with ``encoder_size`` units each.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Encoder(
            letters,
            embedding_size,
            encoder_size,
            cell=cell,
            num_layers=encoder_layers,
            dropout=dropout,
            state_size=hidden_size,
            state_layers=decoder_layers,
        )
        decoder = Decoder(
            phones,
            embedding_size,
            hidden_size,
            encoder.memory_size,
            cell=cell,
            attention=attention,
            num_layers=decoder_layers,
            dropout=dropout,
        )
        model = Seq2Seq(encoder, decoder)
        return model if modules == "rnnkern" else on_torch(model)


def on_torch(model: Seq2Seq) -> Seq2Seq:
    """Puts torch's recurrent modules and plain attention in the place of rnnkern's, keeping every weight."""
    weights = model.state_dict()
    for part in (model.encoder, model.decoder):
        part.recurrent = torch_recurrent(part.recurrent)
    if model.decoder.attention is not None:
        model.decoder.attention = PlainAttention(model.decoder.attention, model.decoder.score)
    model.load_state_dict(weights, strict=True)
    return model


class _Lengths:
    """Gives a recurrent module of torch the keyword ``lengths``, by way of a PackedSequence."""

    def forward(self, input: Tensor, hx: Any = None, *, lengths: Tensor | None = None) -> tuple[Tensor, Any]:
        if lengths is None:
            return super().forward(input, hx)  # type: ignore[misc]
        packed = pack_padded_sequence(input, lengths, enforce_sorted=False)
        output, final = super().forward(packed, hx)  # type: ignore[misc]
        return pad_packed_sequence(output, total_length=input.shape[0])[0], final


class TorchLSTM(_Lengths, nn.LSTM):
    """torch's LSTM with the keyword ``lengths``."""


class TorchGRU(_Lengths, nn.GRU):
    """torch's GRU with the keyword ``lengths``."""


class TorchRNN(_Lengths, nn.RNN):
    """torch's RNN with the keyword ``lengths``."""


def torch_recurrent(module: Any) -> nn.Module:
    """Builds torch's module of the same kind, sizes and options."""
    options = {"bidirectional": module.bidirectional, "dropout": module.dropout}
    sizes = (module.input_size, module.hidden_size, module.num_layers)
    if module.mode == "LSTM":
        return TorchLSTM(*sizes, **options)
    if module.mode == "GRU":
        return TorchGRU(*sizes, **options)
    return TorchRNN(*sizes, nonlinearity=module.mode.removeprefix("RNN_").lower(), **options)


class PlainAttention(nn.Module):
    """The same attention in plain torch operations, with the same weights under the same names."""

    def __init__(self, module: nn.Module, score: str) -> None:
        super().__init__()
        self.score = score
        for name, parameter in module.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, child in module.named_children():  # torch's own Linear modules
            self.add_module(name, child)

    def project_keys(self, key: Tensor) -> Tensor:
        """Projects the keys once per source."""
        if self.score == "general":
            return key @ self.weight.t()  # [B, Tk, Dq]
        return self.key_projection(key) if self.score == "additive" else key  # [B, Tk, A] or [B, Tk, Dk]

    def forward(
        self,
        query: Tensor,  # [B, Tq, Dq]
        key: Tensor,  # [B, Tk, Dk]
        value: Tensor | None = None,  # [B, Tk, Dv]
        *,
        projected_key: Tensor,
        lengths: Tensor | None = None,  # [B]
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Gives the context and, if asked for, the weights."""
        if self.score == "additive":
            mixed = self.query_projection(query).unsqueeze(2) + projected_key.unsqueeze(1)  # [B, Tq, Tk, A]
            scores = mixed.tanh() @ self.vector
        else:
            scores = query @ projected_key.transpose(1, 2)  # [B, Tq, Tk]
        if lengths is not None:
            padding = torch.arange(key.shape[1], device=key.device) >= lengths.to(key.device)[:, None]  # [B, Tk]
            scores = scores.masked_fill(padding[:, None], -torch.inf)
        weights = scores.softmax(2)
        return weights @ (key if value is None else value), weights if need_weights else None
