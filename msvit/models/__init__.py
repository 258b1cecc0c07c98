"""MSViT around a timm backbone: heads, budgets, and models on disk."""
