"""The blog's benchmarks: lmms-eval's plug-in, the blog's columns, and judges."""
