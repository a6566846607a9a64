"""What training of any learned drafter needs."""
