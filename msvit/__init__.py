"""Mixed-scale tokenization for vision transformers, and the methods it is measured against, on one bench."""

from . import zoo
from .gate import Gate
from .masks import make_rule
from .model import MSViT, Result
from .reducers import make_reducer
from .tokens import Tokens

__version__ = "0.1.0"
__all__ = ["MSViT", "Gate", "Result", "Tokens", "make_reducer", "make_rule", "zoo"]
