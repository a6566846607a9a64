"""What the files of learned drafters have in common, whatever their kind and format."""
