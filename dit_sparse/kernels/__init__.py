"""How attention is computed: tensors and block masks, nothing about papers or models."""
