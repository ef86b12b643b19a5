"""The entry point of every stage: `deepspeed --module llava_compodistill.train --stage dft …`; see scripts/."""

import time

import torch

from .run import main

if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        on_gloo = torch.distributed.get_backend() == "gloo"
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        if on_gloo:
            time.sleep(0.5)  # its threads are freeing the tensors of the last collectives, and abort an ending process
