"""The bare PyTorch loop that dstrain's training speed is divided by: `nn.Transformer`, full logits, `F.cross_entropy`, Adam.

The Transformer-Tiny shape with nothing around it: 4+4 post-norm layers, model 128, ffn 256, 4 heads, dropout 0.3, 7,792 tied
entries, label smoothing 0.1, 264 random pairs of 13 source and 13 target tokens a step (3,432 target tokens), no padding, no data
pipeline, no logging. fp32, one thread, torch's and the C library's defaults. Prints one line of JSON: target tokens and
CPU-seconds (user + system of this process) of the steps after the warm-up.

    python tools/bare_loop.py [--steps 12] [--warmup 2]
"""

import argparse
import json
import resource

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_TYPES, MODEL_DIM, NUM_PAIRS, LENGTH = 7792, 128, 264, 13


class BareTransformer(nn.Module):
    """An encoder-decoder transformer out of torch's own parts, one matrix for all embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_TYPES, MODEL_DIM)
        self.positions = nn.Parameter(torch.randn(LENGTH, MODEL_DIM) * 0.02)
        self.layers = nn.Transformer(
            d_model=MODEL_DIM,
            nhead=4,
            num_encoder_layers=4,
            num_decoder_layers=4,
            dim_feedforward=256,
            dropout=0.3,
            batch_first=True,
        )
        self.register_buffer("causal", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        """Logits after each target token. source: (B, S), target: (B, T) -> (B, T, V)"""
        source, target = (self.embedding(side) * MODEL_DIM**0.5 + self.positions for side in (source, target))
        hidden = self.layers(source, target, tgt_mask=self.causal, tgt_is_causal=True)
        return hidden @ self.embedding.weight.T


def cpu_seconds() -> float:
    """User and system time of this process so far."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Train on random tokens and print the cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)

    model = BareTransformer()
    optimizer = torch.optim.Adam(model.parameters(), 5e-4, betas=(0.9, 0.98))
    start = 0.0
    for step in range(args.warmup + args.steps):
        if step == args.warmup:
            start = cpu_seconds()
        source = torch.randint(4, NUM_TYPES, (NUM_PAIRS, LENGTH))
        target = torch.randint(4, NUM_TYPES, (NUM_PAIRS, LENGTH + 1))
        logits = model(source, target[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), target[:, 1:].flatten(), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = cpu_seconds() - start
    print(json.dumps({"target_tokens": args.steps * NUM_PAIRS * LENGTH, "cpu_seconds": round(seconds, 3)}))


if __name__ == "__main__":
    main()
