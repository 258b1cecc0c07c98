"""The method's machinery: tokens, attention among rows, timm's blocks, and what they cost."""
