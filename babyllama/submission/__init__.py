"""Turn a finished run into a submission to BabyLM."""
