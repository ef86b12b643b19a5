"""The entry point of every stage: `deepspeed --module llava_compodistill.train --stage dft …`; see scripts/."""

from .run import end_processes, main

if __name__ == "__main__":
    main()
    end_processes()
