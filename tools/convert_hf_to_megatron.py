#!/usr/bin/env python3
"""Hugging Face folder -> Megatron distributed checkpoint.

tools/convert_hf_to_megatron.py --source HF --out FOLDER [--parallel.tp 2]
"""

import sys

from megatron_aligndistil.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", "--to", "megatron", *sys.argv[1:]]))
