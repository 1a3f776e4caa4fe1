"""Measure probes beside zero-shot CLIP: accuracy, calibration, corruptions, natural shifts, foreign images.

python jobs/evaluate.py --probe runs/pets/probe --data test-photos/ --corruptions all --ood other=other-photos/
python jobs/evaluate.py --encoder ViT-B-32 --pretrained openai --retrieval pairs.parquet
"""

from lpclip.jobs.cli import run_command

if __name__ == "__main__":
    run_command("evaluate")
