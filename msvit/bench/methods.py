"""Methods made ready on a case: a dense backbone in several ways, MSViT in its executions, reducers, and parts."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core import backbone
from ..core.attention_weights import attend_watched
from ..core.blocks import before_attention
from ..core.fast_linear import AVAILABLE, fast_linear
from ..core.macs import embedding_macs, gate_macs, vit_macs
from ..core.rotary import make_rotary, rotate, turn_of
from ..gating.learned import Quota
from ..gating.rules import make_rule
from ..models.msvit import MSViT, Result
from ..reducers.registry import REDUCERS, make_reducer
from .cases import Case, Unavailable
from .timing import Work


@dataclass(frozen=True)
class PreparedMethod:
    """A function to be timed, and what is known of it beforehand.

    Attributes:
        macs: Of the whole call by the closed form, MACs that are executed on padding or on hidden tokens included;
            None where there is no closed form and the count stands alone.
        tokens: That enter the first block, mean per picture.
        settings: A reducer's.
    """

    work: Work
    macs: float | None = None
    tokens: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def _inference(function: Callable, *args: Any, fast: bool = False) -> Work:
    """Return a call of a function in inference mode, with MSViT's own linear layers or with those of timm."""

    @torch.inference_mode()
    def work():
        with fast_linear(fast):
            return function(*args)

    return work


def run_model(case: Case, model: MSViT) -> PreparedMethod:
    """Prepare a packed model."""
    with torch.inference_mode():
        result = model.run(case.images)
    macs = result.macs.sum().item() + case.once_macs + _padding_macs(case, result)
    return PreparedMethod(_inference(model, case.images), macs, tokens=result.tokens.double().mean().item())


def _padding_macs(case: Case, result: Result) -> float:
    """Return the MACs of attention on padding: where CUDA has no packed attention, in float32, pictures are padded."""
    if case.images.device.type != "cuda" or case.images.dtype != torch.float32:
        return 0
    pair = [2 * block.attn.num_heads * block.attn.head_dim for block in case.vit.blocks]
    attended = result.counts[:, 0].double().cpu()
    padding = case.batch * attended.amax(1) ** 2 - (attended**2).sum(1)
    return (padding * torch.tensor(pair)).sum().item()


def run_dense(case: Case, fast: bool = False, compiled: bool = False) -> PreparedMethod:
    """Prepare the backbone as timm has it, with the linear layers that MSViT uses, or compiled."""
    if fast:
        _check_linear(case)
    vit = torch.compile(case.vit, dynamic=False) if compiled else case.vit
    return PreparedMethod(_inference(vit, case.images, fast=fast), case.dense_macs, tokens=case.dense_tokens)


def _check_linear(case: Case):
    if not AVAILABLE or case.images.device.type != "cpu" or case.images.dtype != torch.float32:
        raise Unavailable("MSViT's own linear layers are for float32 on x86; here it uses those of timm")


def run_packed_compiled(case: Case) -> PreparedMethod:
    """Prepare the packed model with what its blocks do row by row compiled."""
    model = case.variant(case.model.gate, case.model.reducer, case.model.threshold)
    model.coarse_embed = case.model.coarse_embed
    prepared = run_model(case, model)
    model.compile()
    return prepared


def run_fine(case: Case) -> PreparedMethod:
    """Prepare the packed model with all regions fine."""
    if isinstance(case.model.gate, Quota):
        raise Unavailable("a quota has no threshold that makes all regions fine")
    return run_model(case, case.variant(case.model.gate, threshold=1.0))


def run_masked(case: Case) -> PreparedMethod:
    """Prepare masked execution: all candidates run; that most are hidden in attention saves nothing."""
    if case.model.reducer is not None:
        raise Unavailable("the run's reducer acts on active tokens only, which masked execution does not save")
    model, vit = case.model, case.vit
    if len(model.scales) > 2:
        raise Unavailable("masked execution is timed with two scales")
    entering = torch.full((case.batch,), vit.num_prefix_tokens + case.regions * (1 + model.scale**2))
    once = gate_macs(model.gate, case.regions) + model.path_macs(case.regions)
    macs = vit_macs(vit, entering).sum().item() + case.batch * once
    work = _inference(partial(model.run, execution="masked"), case.images)
    return PreparedMethod(work, macs + case.once_macs, tokens=case.result.tokens.double().mean().item())


def run_reducer(name: str, case: Case) -> PreparedMethod:
    """Prepare a reducer alone, with no gate, at about the packed model's MACs."""
    settings = case.fits.get(name, {})
    try:
        reducer = make_reducer(name, case.vit, **settings).to(case.images)
    except ValueError as error:
        raise Unavailable(str(error)) from None
    return replace(run_model(case, case.variant(make_rule("fine"), reducer)), settings=settings)


def run_tokenizer(case: Case) -> PreparedMethod:
    """Prepare all that comes before the first block: decisions, pixels, embeddings, positions."""
    model, images = case.model, case.images
    once = model.path_macs(*case.undivided) + model.gate_macs(case.undivided, case.size)
    macs = _embedding_macs(case) + (torch.zeros_like(case.result.tokens) + once).sum().item()
    return PreparedMethod(_inference(lambda: model.tokenize(images, model.decide(images)), fast=True), macs)


def run_embedding(case: Case) -> PreparedMethod:
    """Prepare the product of the active patches' pixels with the embedding's weights alone."""
    patches = int((case.result.tokens - case.vit.num_prefix_tokens).sum())
    pixels = case.images.new_ones(patches, case.vit.patch_embed.proj.weight[0].numel())
    return PreparedMethod(_inference(backbone.embed, case.vit, pixels, fast=True), _embedding_macs(case))


def _embedding_macs(case: Case) -> float:
    return embedding_macs(case.vit, case.result.tokens).sum().item()


def _random_tokens(case: Case) -> Tensor:
    """Return random tokens `[B, N, C]`, as many as a dense batch has between blocks."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(case.batch * case.dense_tokens, case.vit.embed_dim, generator=generator)
    return rows.to(case.images).view(case.batch, case.dense_tokens, -1)


def run_block(case: Case) -> PreparedMethod:
    """Prepare the block at half the depth, on all tokens."""
    return PreparedMethod(_inference(case.vit.blocks[len(case.vit.blocks) // 2], _random_tokens(case), fast=True))


@torch.inference_mode()
def run_clustering(method: str, case: Case) -> PreparedMethod:
    """Prepare what Token Pooling does in that block between attention and MLP, to half the patch tokens."""
    layer, vit, model = len(case.vit.blocks) // 2, case.vit, case.model
    tokens = model.tokenize(case.images, model.decide(case.images, model.all_fine(case.size)), "packed")
    tokens = replace(tokens, x=_random_tokens(case).flatten(0, 1))
    _, q, k, v = before_attention(vit.blocks[layer], tokens.x)
    turn = turn_of(make_rotary(vit), layer, tokens)
    _, received = attend_watched(tokens.layout, rotate(q, turn), rotate(k, turn), v)
    half = math.prod(model.patches(case.size)) // 2
    reducer = make_reducer("token_pooling", vit, clusters=[half], layers=[layer], method=method)
    return PreparedMethod(_inference(reducer.after_attention, layer, tokens, received), settings=reducer.settings)


def train_step(execution: str, case: Case, fast: bool = False) -> PreparedMethod:
    """Prepare forward and backward of a training step; the optimiser's step and the gate loss are left out."""
    model, images, device = case.trained, case.images.float(), case.images.device
    if fast:
        _check_linear(case)
    labels = torch.arange(case.batch, device=device) % case.vit.num_classes
    lower = case.images.dtype != torch.float32

    def work():
        with torch.autocast(device.type, case.images.dtype) if lower else nullcontext(), fast_linear(fast):
            logits = model.vit(images) if execution == "dense" else model.run(images, execution=execution).logits
            loss = F.cross_entropy(logits.float(), labels)
        loss.backward()
        model.zero_grad(set_to_none=True)

    return PreparedMethod(work)


PREPARE: dict[str, Callable[[Case], PreparedMethod]] = {
    "dense": run_dense,
    "dense-linear": partial(run_dense, fast=True),
    "dense-compiled": partial(run_dense, compiled=True),
    "packed": lambda case: run_model(case, case.model),
    "packed-compiled": run_packed_compiled,
    "fine": run_fine,
    "masked": run_masked,
    **{name: partial(run_reducer, name) for name in REDUCERS},
    "gate": run_tokenizer,
    "embedding": run_embedding,
    "block": run_block,
    "kmeans": partial(run_clustering, "kmeans"),
    "kmedoids": partial(run_clustering, "kmedoids"),
    "train-dense": partial(train_step, "dense"),
    "train-dense-linear": partial(train_step, "dense", fast=True),
    "train-masked": partial(train_step, "masked"),
    "train-trimmed": partial(train_step, "trimmed"),
}
