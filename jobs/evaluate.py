"""Measure probes beside zero-shot CLIP: accuracy, calibration, corruptions, natural shifts, foreign images.

python jobs/evaluate.py --probe runs/pets/probe --data test-photos/ --corruptions all --ood other=other-photos/
python jobs/evaluate.py --encoder ViT-B-32 --pretrained openai --retrieval pairs.parquet
"""

from lpclip.config import EvaluateJob
from lpclip.jobs.cli import main


def run(job: EvaluateJob) -> None:
    """Run the job. The libraries are imported here: --help and wrong flags need not wait for them."""
    from lpclip.jobs.evaluate import evaluate_job

    evaluate_job(job)


if __name__ == "__main__":
    main(run, EvaluateJob)
