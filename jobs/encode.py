"""Encode images once into a feature store.

python jobs/encode.py --data photos/ --encoder ViT-B-32 --pretrained laion2b_s34b_b79k --out runs/photos
"""

from lpclip.jobs.cli import run_command

if __name__ == "__main__":
    run_command("encode")
