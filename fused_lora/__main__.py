"""`python -m fused_lora`, which torchrun can start: torchrun --nproc-per-node 2 -m -- fused_lora"""

from .cli import main

main()
