"""`python -m lora_align`, and `accelerate launch -m lora_align`."""

from lora_align.cli import main

if __name__ == "__main__":
    main()
