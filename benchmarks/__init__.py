import os

# PyTorch's profiler, which measures memory on the CPU, reports each start otherwise. Read when torch is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
