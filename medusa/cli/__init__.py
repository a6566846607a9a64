"""What the commands that train and calibrate heads do; `scripts/` holds their entry points."""
