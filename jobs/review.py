"""Label the images that help most, in the browser.

python jobs/review.py --run runs/selftrain
"""

from lpclip.jobs.cli import run_command

if __name__ == "__main__":
    run_command("review")
