"""Token-level language model alignment by adaptive policy distillation, on Megatron-Core."""

__version__ = "0.1.0"
