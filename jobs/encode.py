"""Encode images once into a feature store.

python jobs/encode.py --data photos/ --encoder ViT-B-32 --pretrained laion2b_s34b_b79k --out runs/photos
"""

from lpclip.config import EncodeJob
from lpclip.jobs.cli import main


def run(job: EncodeJob) -> None:
    """Run the job. The libraries are imported here: --help and wrong flags need not wait for them."""
    from lpclip.jobs.encode import encode_job

    encode_job(job)


if __name__ == "__main__":
    main(run, EncodeJob)
