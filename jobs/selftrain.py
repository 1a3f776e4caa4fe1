"""Train a linear probe on unlabelled images, from a CLIP model's own pseudo-labels.

python jobs/selftrain.py --data photos/ --classes cat,dog --encoder ViT-B-32 --pretrained laion2b_s34b_b79k
"""

from lpclip.jobs.cli import run_command

if __name__ == "__main__":
    run_command("selftrain")
