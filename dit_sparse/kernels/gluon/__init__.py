"""Kernels in Gluon, which triton has as an experiment: imported only where they can run."""
