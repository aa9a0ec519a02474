//! What the host makes of a guest's control stream: in whatever pieces it comes, it means the same.
#![no_main]

use cloche_protocol::{
    frame::{self, Decoder, MAX_BODY_BYTES},
    message::FromGuest,
};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let Some((first, stream)) = bytes.split_first() else { return };
    let whole = messages([stream]);
    assert_eq!(whole, messages(stream.chunks(usize::from(*first).max(1))));
    for message in whole.0 {
        let mut wire = Vec::new();
        if frame::write(&mut wire, &message).is_ok() {
            assert_eq!(frame::read::<FromGuest>(wire.as_slice()).unwrap(), Some(message));
        }
    }
});

/// The messages, and the error after them if there was one.
fn messages<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<FromGuest>, Option<String>) {
    let mut decoder = Decoder::default();
    let mut seen = Vec::new();
    for piece in pieces {
        decoder.push(piece);
        loop {
            match decoder.take() {
                Ok(Some(message)) => seen.push(message),
                Ok(None) => break,
                Err(error) => {
                    let text = error.to_string();
                    assert!(text.len() < 200 && !text.chars().any(char::is_control), "{text:?}");
                    return (seen, Some(text));
                }
            }
        }
        assert!(piece.len() > MAX_BODY_BYTES as usize || decoder_is_bounded(&decoder, piece));
    }
    (seen, None)
}

/// A frame under way is never larger than a frame may be.
fn decoder_is_bounded(decoder: &Decoder, piece: &[u8]) -> bool {
    decoder.is_empty() || piece.len() <= 4 + MAX_BODY_BYTES as usize
}
