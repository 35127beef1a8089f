"""What EasyEdit's files become: settings of its ``hparams``, and its lists of requests."""
