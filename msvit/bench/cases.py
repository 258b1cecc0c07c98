"""What `msvit bench` times: a dense backbone in several ways, MSViT in its executions, reducers, and parts of these."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import backbone
from ..core import fast_linear as linear
from ..core import macs as measure
from ..core.attention import Layout, attend_watched
from ..core.blocks import before_attention
from ..core.fast_linear import fast_linear
from ..core.tokens import Tokens
from ..gating.gate import Gate
from ..gating.rules import make_rule
from ..models.msvit import MSViT
from ..reducers.registry import REDUCERS, make_reducer
from .timing import Work

TRAINING_SHARE = 0.6  # of coarse regions in the training steps


class Unavailable(RuntimeError):
    """A row that this model or machine cannot have, and why."""


@dataclass(frozen=True)
class Contender:
    """A function to be timed, and what is known of it beforehand.

    Attributes:
        macs: Of the whole call by the closed form, MACs that are executed on padding or on hidden tokens included;
            None where there is no closed form and the count stands alone.
        tokens: That enter the first block, mean per picture.
        settings: A reducer's.
    """

    work: Work
    macs: float | None
    tokens: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


class Case:
    """A batch of pictures and a gated model in evaluation mode, of which the rows are made.

    Args:
        model: Its threshold says which regions are coarse.
        fits: Reducer -> settings that match its MACs to the packed model's.
    """

    def __init__(self, model: MSViT, images: Tensor, fits: dict[str, dict[str, Any]]):
        self.model, self.vit, self.images, self.fits = model, model.vit, images, fits
        self.batch, self.size = len(images), images.shape[-2:]
        self.dense = self.batch * (model.dense_macs(self.size) + self.once)
        self.dense_tokens = self.vit.num_prefix_tokens + self.regions * model.scale**2

    @property
    def regions(self) -> int:
        h, w = self.model.grid(self.size)
        return h * w

    @property
    def once(self) -> int:
        """The latent query of attention pooling is in no closed form: MSViT projects it once a batch, timm B times."""
        pool = self.vit.attn_pool
        return 0 if pool is None else pool.latent_len * measure.linear_macs(pool.q)

    @cached_property
    @torch.inference_mode()
    def result(self):
        """What the packed model computes."""
        return self.model.run(self.images)

    @cached_property
    def trained(self) -> MSViT:
        """A copy in training mode and float32, whose gate makes TRAINING_SHARE of the regions coarse."""
        if self.model.reducer is not None or not isinstance(self.model.gate, Gate):
            raise Unavailable("training steps are timed with a gate, and without a reducer")
        model = copy.deepcopy(self.model).float().train().requires_grad_(True)
        _tilt(model.gate, self.images.float(), TRAINING_SHARE)
        return model

    @cached_property
    def labels(self) -> Tensor:
        return torch.arange(self.batch, device=self.images.device) % self.vit.num_classes

    def variant(self, gate: nn.Module, reducer: nn.Module | None = None, threshold: float = 0.5) -> MSViT:
        """Another model around the same backbone."""
        model = MSViT(self.vit, self.model.scale, gate, reducer=reducer, fast_cpu=True).eval()
        model.cut = self.model.cut.clone().fill_(threshold)
        return model

    def run_of(self, model: MSViT) -> Contender:
        """A packed model on these pictures."""
        with torch.inference_mode():
            result = model.run(self.images)
        macs = result.macs.sum().item() + self.once + self._padding(result)
        return Contender(inferred(lambda: model(self.images)), macs, result.tokens.double().mean().item())

    def _padding(self, result) -> float:
        """MACs of attention on padding: where CUDA has no packed attention, in float32, pictures are padded."""
        if self.images.device.type != "cuda" or self.images.dtype != torch.float32:
            return 0
        pair = [2 * block.attn.num_heads * block.attn.head_dim for block in self.vit.blocks]
        seen = result.counts[:, 0].double().cpu()
        room = self.batch * seen.amax(1) ** 2 - (seen**2).sum(1)
        return (room * torch.tensor(pair)).sum().item()


def inferred(work: Work) -> Work:
    def inside():
        with torch.inference_mode():
            return work()

    return inside


def _tilt(gate: Gate, images: Tensor, share: float):
    """Moves the gate's bias so that its noisy decisions make this share of the regions coarse."""
    with torch.no_grad():
        scores, (low, high) = gate(images).double(), (-1e3, 1e3)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if (scores + middle).sigmoid().mean() > share else (middle, high)
        gate.mlp[-1].bias += middle


def dense(case: Case) -> Contender:
    return Contender(inferred(lambda: case.vit(case.images)), case.dense, case.dense_tokens)


def dense_linear(case: Case) -> Contender:
    _check_linear(case)

    def work():
        with fast_linear():
            return case.vit(case.images)

    return Contender(inferred(work), case.dense, case.dense_tokens)


def _check_linear(case: Case):
    if not linear.AVAILABLE or case.images.device.type != "cpu" or case.images.dtype != torch.float32:
        raise Unavailable("MSViT's own linear layers are for float32 on x86; here it uses those of timm")


def dense_compiled(case: Case) -> Contender:
    compiled = torch.compile(case.vit, dynamic=False)
    return Contender(inferred(lambda: compiled(case.images)), case.dense, case.dense_tokens)


def packed(case: Case) -> Contender:
    return case.run_of(case.model)


def packed_compiled(case: Case) -> Contender:
    model = case.variant(case.model.gate, case.model.reducer, case.model.threshold)
    model.coarse_embed = case.model.coarse_embed
    contender = case.run_of(model)
    model.compile_blocks()
    return contender


def masked(case: Case) -> Contender:
    """All candidates run; that most are hidden in attention saves nothing."""
    if case.model.reducer is not None:
        raise Unavailable("the run's reducer acts on active tokens only, which masked execution does not save")
    model, vit = case.model, case.vit
    entering = torch.full((case.batch,), vit.num_prefix_tokens + case.regions * (1 + model.scale**2))
    macs = measure.vit_macs(vit, entering).sum().item() + case.batch * measure.gate_macs(model.gate, case.regions)
    work = inferred(lambda: model.run(case.images, execution="masked"))
    return Contender(work, macs + case.once, case.result.tokens.double().mean().item())


def all_fine(case: Case) -> Contender:
    return case.run_of(case.variant(case.model.gate, threshold=1.0))


def reduced(name: str, case: Case) -> Contender:
    """A reducer alone, with no gate, at about the packed model's MACs."""
    settings = case.fits.get(name, {})
    try:
        reducer = make_reducer(name, case.vit, **settings).to(case.images)
    except ValueError as error:
        raise Unavailable(str(error)) from None
    known = case.run_of(case.variant(make_rule("fine"), reducer))
    return Contender(known.work, known.macs, known.tokens, settings)


def gate_and_tokenizer(case: Case) -> Contender:
    """All that comes before the first block: decisions, pixels, embeddings, positions."""
    model = case.model

    def work():
        with fast_linear():
            return model.tokenize(case.images, model.decide(case.images))

    macs = case.batch * measure.gate_macs(model.gate, case.regions)
    return Contender(inferred(work), macs + measure.embedding_macs(case.vit, case.result.tokens).sum().item())


def embedding(case: Case) -> Contender:
    """The product of the active patches' pixels with the embedding's weights alone."""
    patches = int((case.result.tokens - case.vit.num_prefix_tokens).sum())
    pixels = case.images.new_ones(patches, case.vit.patch_embed.proj.weight[0].numel())

    def work():
        with fast_linear():
            return backbone.embed(case.vit, pixels)

    return Contender(inferred(work), measure.embedding_macs(case.vit, case.result.tokens).sum().item())


def _rows(case: Case) -> Tensor:
    """The rows of a whole batch between blocks."""
    dice = torch.Generator().manual_seed(0)
    return torch.randn(case.batch * case.dense_tokens, case.vit.embed_dim, generator=dice).to(case.images)


def one_block(case: Case) -> Contender:
    """The block at half the depth, on all tokens."""
    block, x = case.vit.blocks[len(case.vit.blocks) // 2], _rows(case).view(case.batch, case.dense_tokens, -1)

    def work():
        with fast_linear():
            return block(x)

    return Contender(inferred(work), None)


@torch.inference_mode()
def clustering(method: str, case: Case) -> Contender:
    """What Token Pooling does in that block between attention and MLP, to half the patch tokens."""
    layer, n, vit = len(case.vit.blocks) // 2, case.dense_tokens, case.vit
    layout, prefix = Layout([n] * case.batch, case.images.device), vit.num_prefix_tokens
    h, w = (side * case.model.scale for side in case.model.grid(case.size))
    where = torch.arange(case.batch * n, device=layout.device).view(case.batch, n)[:, prefix:].unflatten(1, (h, w))
    tokens = Tokens(_rows(case), None, torch.ones(case.batch * n, device=layout.device), where, layout)
    _, q, k, v = before_attention(vit.blocks[layer], tokens.x)
    seen = attend_watched(layout, q, k, v).received
    reducer = make_reducer("token_pooling", vit, clusters=[h * w // 2], layers=[layer], method=method)
    return Contender(inferred(lambda: reducer.after_attention(layer, tokens, seen)), None, settings=reducer.settings)


def step(execution: str, fast: bool, case: Case) -> Contender:
    """Forward and backward of a training step; the optimiser's step and the gate loss are left out."""
    model, images, device = case.trained, case.images.float(), case.images.device
    if fast:
        _check_linear(case)
    lower = case.images.dtype != torch.float32

    def work():
        with torch.autocast(device.type, case.images.dtype) if lower else nullcontext():
            if execution == "dense":
                with fast_linear() if fast else nullcontext():
                    logits = model.vit(images)
            else:
                logits = model.run(images, execution=execution).logits
            loss = F.cross_entropy(logits.float(), case.labels)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return Contender(work, None)


class Row(NamedTuple):
    """A line of the table.

    Attributes:
        kind: "model" and "training" are held against the dense row of their kind, "part" against the row `of`.
        usual: Whether it is timed without being asked for.
        compiled: Its products are hidden from the count, and it may fail for want of a compiler.
    """

    label: str
    make: Callable[[Case], Contender]
    kind: str = "model"
    of: str = "dense"
    usual: bool = True
    compiled: bool = False


ROWS = {
    "dense": Row("dense timm", dense),
    "dense-linear": Row("dense, same linear layers", dense_linear),
    "dense-compiled": Row("dense compiled", dense_compiled, compiled=True),
    "packed": Row("MSViT packed", packed),
    "packed-compiled": Row("MSViT packed, rows' work compiled", packed_compiled, usual=False, compiled=True),
    "fine": Row("MSViT packed, all fine", all_fine),
    "masked": Row("MSViT masked", masked),
    **{name: Row(name, partial(reduced, name)) for name in REDUCERS},
    "gate": Row("gate + tokenizer", gate_and_tokenizer, "part", "packed"),
    "embedding": Row("of which embedding", embedding, "part", "packed"),
    "block": Row("one block, all tokens", one_block, "part", "dense", usual=False),
    "kmeans": Row("K-means in it, to half", partial(clustering, "kmeans"), "part", "block", usual=False),
    "kmedoids": Row("K-medoids in it, to half", partial(clustering, "kmedoids"), "part", "block", usual=False),
    "train-dense": Row("training step, dense timm", partial(step, "dense", False), "training", "train-dense"),
    "train-dense-linear": Row(
        "training step, dense, same linear layers", partial(step, "dense", True), "training", "train-dense"
    ),
    "train-masked": Row("training step, masked", partial(step, "masked", False), "training", "train-dense"),
    "train-trimmed": Row("training step, trimmed", partial(step, "trimmed", False), "training", "train-dense"),
}
BASES = ("dense", "dense-linear", "dense-compiled")  # what a row is held against, with "train-" before it in training
