"""The adapter: put in, run, saved, loaded, merged."""

from ..kernels.quantized import keep_kernels_away

keep_kernels_away()  # before PEFT, which is imported in this room, can import bitsandbytes
