# `just` alone does what CI does.
default:
    bash .ci/run

# An editable install with everything for working on the code.
setup:
    python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e '.[dev]'

test *words:
    .venv/bin/pytest {{words}}

lint:
    .venv/bin/ruff check && .venv/bin/ruff format --check

types:
    .venv/bin/mypy

fmt:
    .venv/bin/ruff check --fix && .venv/bin/ruff format

# Write the generated parts of the pages in docs/.
docs:
    .venv/bin/python docs/build.py

demo:
    .venv/bin/lora-align demo

# Train the built-in base from scratch, in about fifty minutes on two cores.
demo-base:
    .venv/bin/python -m lora_align.demo.build

# Run most benchmarks, and store the results in tests/benchmarks/results/.
bench:
    .venv/bin/python tests/benchmarks/startup.py
    .venv/bin/python tests/benchmarks/crowded.py
    .venv/bin/python tests/benchmarks/packing.py
    .venv/bin/python tests/benchmarks/kills.py
    .venv/bin/python tests/benchmarks/training_kills.py --work .bench/kills
    .venv/bin/python tests/benchmarks/control.py --work .bench
    .venv/bin/python tests/benchmarks/fronts.py --work .bench/fronts
    .venv/bin/python tests/benchmarks/methods.py --work .bench
    .venv/bin/python tests/benchmarks/tune.py --work .bench/tune
    .venv/bin/python tests/benchmarks/algebra.py --work .bench/algebra
    .venv/bin/python tests/benchmarks/growth.py --work .bench/growth
    .venv/bin/python tests/benchmarks/rows.py --work .bench/rows

real := '--base "$(.venv/bin/python tests/fetch_real_base.py .bench)" --splits .bench/splits'

# Run the benchmarks that also use SmolLM2-135M and the pairs in the folder LORA_ALIGN_REAL_DATA. This takes hours.
bench-real:
    .venv/bin/python tests/benchmarks/splits.py --data "$LORA_ALIGN_REAL_DATA" --out .bench/splits
    .venv/bin/python tests/benchmarks/sampling.py {{real}}
    .venv/bin/python tests/benchmarks/plan_accuracy.py --work .bench/planning {{real}}
    .venv/bin/python tests/benchmarks/training.py --work .bench/training {{real}}
    .venv/bin/python tests/benchmarks/laptop.py --work .bench/laptop {{real}}
    .venv/bin/python tests/benchmarks/agreement.py --work .bench/agreement --preference brief {{real}}
    .venv/bin/python tests/benchmarks/gguf_quality.py {{real}}

# Test the claims of both papers in about two hours, into tests/benchmarks/evidence/. Run it again to continue.
evidence:
    .venv/bin/python tests/benchmarks/evidence.py --work .bench/evidence

# Make a sweep's page on a small Llama from the folder that LORA_ALIGN_REAL_DATA names.
stories:
    .venv/bin/python tests/benchmarks/stories.py --work .bench/stories

# Compare sft, dpo, merge and chat on a CUDA card with the CPU.
gpu-check:
    .venv/bin/python tests/benchmarks/gpu_check.py

# Measure bases of 8 B and 135 M parameters within 24 GB of a CUDA card, beside TRL and unsloth. Needs 23 GB of disk.
# `just gpu-bench --minutes 7` measures the most important first, and stops.
gpu-bench *options:
    .venv/bin/python tests/benchmarks/gpu.py --work .bench/gpu {{options}}

# Check a CUDA card, then measure for seven minutes. Never run.
gpu: gpu-check (gpu-bench "--minutes" "7")
