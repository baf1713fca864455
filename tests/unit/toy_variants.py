"""A toy of every kind that dstrain/README.md tells how to add, as edits of the package, and a program that uses them all.

An edit is the text of a new file, or pairs of an anchor, which the file holds once, and what stands in its place.
"""

Edit = str | tuple[tuple[str, str], ...]

NORM: dict[str, Edit] = {
    "dstrain/nn/toy.py": """
import torch
from torch import Tensor, nn


class ToyNorm(nn.Module):
    def __init__(self, model_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model_dim))

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + 1e-5) * self.weight
""",
    "dstrain/models/config.py": (
        ("NormConfig = Annotated", 'class ToyNormConfig(Config):\n    kind: Literal["toy"] = "toy"\n\n\nNormConfig = Annotated'),
        ("LayerNormConfig | RmsNormConfig,", "LayerNormConfig | RmsNormConfig | ToyNormConfig,"),
    ),
    "dstrain/models/factory.py": (
        (
            "from dstrain.nn.stack import LayerStack\n",
            "from dstrain.nn.stack import LayerStack\nfrom dstrain.nn.toy import ToyNorm\n",
        ),
        (
            '            case "rms_norm":\n',
            '            case "toy":\n                return ToyNorm(self.config.model_dim)\n            case "rms_norm":\n',
        ),
    ),
}

ACTIVATION: dict[str, Edit] = {
    "dstrain/ops/activation.py": (('        "relu": F.relu,\n', '        "relu": F.relu,\n        "toy": F.softsign,\n'),),
    "dstrain/models/config.py": (('"gelu_tanh", "silu"', '"gelu_tanh", "toy", "silu"'),),
}

OBJECTIVE: dict[str, Edit] = {
    "dstrain/ops/token_loss/toy.py": '''
from dstrain.ops.chunked_projection import TokenLosses, chunked_loss


class TokenToy:
    """Half the square of the negative log-likelihood."""

    num_metrics = 1

    def __call__(self, logits, logit_sums, labels, vocabulary, weights):
        reductions = vocabulary.reductions()
        label_logits = reductions.gather(logits, labels)
        nll = reductions.softmax_(logits).result().nll(label_logits.result())
        return TokenLosses(nll.square() / 2, (nll,), vocabulary.add_at_(logits, labels, -1.0).mul_(nll))


def linear_toy(features, weight, labels, vocabulary):
    targets = labels.unsqueeze(1)
    loss_sum, (nll,) = chunked_loss(features, weight, TokenToy(), targets, chunk_tokens=5, vocabulary=vocabulary)
    return loss_sum, nll.sum()
''',
    "dstrain/objectives/toy.py": """
from functools import partial

from dstrain.batch import Metrics
from dstrain.objectives.cross_entropy import target_hidden
from dstrain.objectives.objective import LossOutput
from dstrain.ops.token_loss.toy import linear_toy


class Toy:
    selection = None

    def __call__(self, model, batch, selected=None):
        reduce = partial(linear_toy, labels=batch.targets.labels)
        loss_sum, nll_sum = model.reduce_projection(target_hidden(model, batch), reduce)
        return LossOutput(loss_sum, batch.size, Metrics.over(batch.num_targets, {"nll": nll_sum}))

    def denominator(self, size):
        return size.num_targets

    def close(self):
        pass
""",
    "dstrain/objectives/config.py": (
        (
            "class RDropConfig(Config):",
            """class ToyConfig(Config):
    kind: Literal["toy"] = "toy"
    needs: ClassVar[Needs] = Needs()

    @property
    def validation(self) -> CrossEntropyConfig:
        return CrossEntropyConfig()


class RDropConfig(Config):""",
        ),
        ("from typing import Annotated, ", "from typing import Annotated, ClassVar, "),
    ),
    "dstrain/recipe.py": (
        ("Annotated[CrossEntropyConfig |", "Annotated[CrossEntropyConfig | ToyConfig |"),
        ("import CrossEntropyConfig\n", "import CrossEntropyConfig, ToyConfig\n"),
    ),
    "dstrain/build/objective.py": (
        ("from dstrain.recipe import", "from dstrain.objectives.toy import Toy\nfrom dstrain.recipe import"),
        (
            '"distillation": plan_distillation}',
            '"distillation": plan_distillation, "toy": lambda *_: ObjectivePlan(lambda mesh: Toy())}',
        ),
    ),
}

SOURCE: dict[str, Edit] = {
    "dstrain/data/config.py": (
        (
            "TextSource = Annotated[",
            'class ToyText(Corpus):\n    kind: Literal["toy"]\n    path: str\n\n\nTextSource = Annotated[',
        ),
        ("PlainText | FairseqText, Field", "PlainText | FairseqText | ToyText, Field"),
    ),
    "dstrain/data/sources/corpora.py": (
        ("    TextSource,\n", "    TextSource,\n    ToyText,\n"),
        ("case TsvText() | JsonlText()", "case ToyText() | TsvText() | JsonlText()"),
        (
            "        case PlainText():\n",
            """        case ToyText():
            pairs = [line.split(" ||| ") for line in decode_lines(block, 0)]
            return [source for source, _ in pairs], [target for _, target in pairs]
        case PlainText():
""",
        ),
    ),
}

VERB: dict[str, Edit] = {
    "dstrain/cli/toy.py": '''
"""dstrain toy: say a word."""


def add_arguments(parser):
    parser.add_argument("word")


def run(args):
    print(f"the word is {args.word}")
    return 0
''',
    "dstrain/cli/verbs.py": (("VERBS = {\n", 'VERBS = {\n    "toy": "say a word",\n'),),
}

KERNEL: dict[str, Edit] = {
    "dstrain/ops/cpu/toy.py": '''
def toy_argmax(scores):
    """(n, V) -> (n, 1)"""
    return scores.topk(1).indices
''',
    "dstrain/ops/kernels.py": (
        (
            "from dstrain.ops.cpu.attention import",
            "from dstrain.ops.cpu.toy import toy_argmax\nfrom dstrain.ops.cpu.attention import",
        ),
        (
            '[Kernel("numpy", numpy_argmax',
            '[Kernel("toy", toy_argmax, "cpu", package="no_such_package"), Kernel("numpy", numpy_argmax',
        ),
    ),
    "dstrain/engine/config.py": (('argmax: Literal["auto", ', 'argmax: Literal["auto", "toy", '),),
}

FAIRSEQ_OPTION: dict[str, Edit] = {
    "dstrain/interop/fairseq/options.py": (("        adam_stable amp", "        toy_embedding_norm adam_stable amp"),),
    "dstrain/interop/fairseq/model.py": (
        ('settings["layernorm_embedding"],', 'settings["layernorm_embedding"] or settings["toy_embedding_norm"],'),
    ),
}

EXPORT: dict[str, Edit] = {
    "dstrain/interop/toy.py": """
from dstrain.checkpoint.bundle import find_bundle


def export_toy(bundle, output):
    output.mkdir()
    (output / "toy.txt").write_text("\\n".join(sorted(find_bundle(bundle).names())))
    return [f"{bundle} is a toy in {output}"]
""",
    "dstrain/cli/export.py": (
        (
            "EXPORT_FORMATS = {",
            """def _toy(args):
    from dstrain.interop.toy import export_toy

    return export_toy(args.bundle, args.output)


EXPORT_FORMATS = {"toy": ExportFormat("a toy", "toy.txt", _toy), """,
        ),
    ),
}

TASK: dict[str, Edit] = {
    "dstrain/data/tasks/toy.py": """
from dstrain.data.tasks.task import MostTokens


class ToyTask:
    def __call__(self, texts, draws):
        return texts._replace(tokens=texts.tokens + 1), texts

    def lengths(self, lengths, draws):
        return lengths, lengths

    def longest(self, length):
        return MostTokens(length, length, 2 * length)
""",
    "dstrain/data/tasks/config.py": (
        (
            "TextTask = Annotated[",
            'class Toy(Config):\n    kind: Literal["toy"] = "toy"\n\n    def symbols(self):\n        return ()\n\n\n'
            "TextTask = Annotated[",
        ),
        ("SpanCorruption | Mass,", "SpanCorruption | Mass | Toy,"),
    ),
    "dstrain/data/tasks/build.py": (
        ("    SpanCorruption,\n    TextTask,\n", "    SpanCorruption,\n    TextTask,\n    Toy,\n"),
        (
            "from dstrain.errors import DataError\n",
            "from dstrain.data.tasks.toy import ToyTask\nfrom dstrain.errors import DataError\n",
        ),
        ("        case Mass():\n", "        case Toy():\n            return ToyTask()\n        case Mass():\n"),
    ),
}

TOYS = {
    "A model variant, such as a norm": NORM,
    "An activation": ACTIVATION,
    "An objective with a token loss of its own": OBJECTIVE,
    "A data source": SOURCE,
    "A task of text": TASK,
    "A verb": VERB,
    "A kernel": KERNEL,
    "An option of fairseq": FAIRSEQ_OPTION,
    "A format of export": EXPORT,
}
"""By the headings of dstrain/README.md."""

RECIPE = """
version: 1
data:
  train: [{kind: toy, path: pairs.txt}]
  valid: [{kind: toy, path: pairs.txt}]
  tokenizer: {kind: sentencepiece, vocab_size: 60}
batching: {tokens_per_step: 200, max_tokens: 200}
model:
  kind: encoder_decoder
  model_dim: 8
  encoder: {depth: 1, num_heads: 2, ffn_dim: 8}
  decoder: {depth: 1, num_heads: 2, ffn_dim: 8}
  norm: {kind: toy}
  activation: toy
objective: {kind: toy}
optimizer: {learning_rate: 0.01}
schedule: {kind: constant}
engine: {deepspeed: zero0}
training: {seed: 1, max_steps: 2}
validation: {generation: null}
reporting: {log_every: 1}
"""

PROGRAM = """
import contextlib, io, json, sys

def verb(*words):
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main(words)
    assert code == 0, words
    return output.getvalue()

from dstrain.cli.main import main

found = {"show": verb("show", "toy.yaml"), "verb": verb("toy", "swordfish"), "torch_free": "torch" not in sys.modules}

import dstrain, torch
from torch.nn import functional as F
from dstrain.interop.fairseq.command_line.convert import recipe_from_command
from dstrain.ops.kernels import ARGMAX
from dstrain.ops.token_loss.toy import linear_toy

found["package"] = dstrain.__file__
found["kernels"] = str(ARGMAX.states("cpu", torch.float32)["toy"])
with ARGMAX.forced("toy"):
    kernel = ARGMAX.choose(torch.device("cpu"), torch.float32)
found["forced"] = [kernel.__name__, kernel(torch.tensor([[1.0, 3.0, 2.0]])).tolist()]

torch.manual_seed(1)
labels = torch.randint(23, (7,))
features, weight = (torch.randn(n, 6, dtype=torch.float64, requires_grad=True) for n in (7, 23))
ours = torch.autograd.grad(linear_toy(features, weight, labels, None)[0], (features, weight))
plain = F.cross_entropy(features @ weight.T, labels, reduction="none").square().sum() / 2
reference = torch.autograd.grad(plain, (features, weight))
found["difference"] = max((a - b).abs().max().item() for a, b in zip(ours, reference))

from dstrain.data.config import PlainText
from dstrain.data.ragged import Ragged
from dstrain.data.tasks.build import build_task
task = build_task(PlainText(path="text", task={"kind": "toy"}).task, None, "data.train.0.task")
found["task"] = [side.tokens.tolist() for side in task(Ragged.of([[4, 5]]), None)]

command = "fairseq-train data-bin --source-lang en --target-lang de --arch transformer --optimizer adam --lr 0.001"
command += " --max-tokens 4096 --max-update 10"
found["imported"] = [recipe_from_command(command + words) for words in ("", " --toy-embedding-norm")]

verb("prepare", "toy.yaml", "--output", "data", "--workers", "1")
verb("train", "toy.yaml", "--data", "data", "--output", "run")
verb("validate", "run/bundles/last", "--data", "data")
found["exported"] = verb("export", "run/bundles/last", "--format", "toy", "--output", "exported")
with open("run/events.jsonl") as events:
    found["steps"] = [event for event in map(json.loads, events) if event["kind"] == "train"]
with open("found.json", "w") as file:
    json.dump(found, file)
"""
