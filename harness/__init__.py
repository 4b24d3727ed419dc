"""What every test item needs, whatever compiler it is of: cases, models, inputs, checks, processes and rows."""
