use super::*;

fn parse(text: &str) -> Dockerfile {
    Dockerfile::parse(text).unwrap_or_else(|error| panic!("{error}\n{text}"))
}

fn steps(text: &str) -> Vec<Instruction> {
    let file = parse(&format!("FROM scratch\n{text}"));
    file.stages.into_iter().flat_map(|stage| stage.steps).map(|step| step.instruction).collect()
}

fn problem(text: &str) -> (usize, String) {
    let error = Dockerfile::parse(text).expect_err(text);
    (error.place.line, error.to_string())
}

fn run(text: &str) -> Instruction {
    Instruction::Run { flags: Vec::new(), command: Command::Shell(text.into()), heredocs: Vec::new() }
}

#[test]
fn continuations_skip_comments_and_empty_lines() {
    let made = steps("RUN a \\\n  # remark\n\n  b \\  \n c\nRUN d\n");
    assert_eq!(made, [run("a   b  c"), run("d")]);
    // Two escape characters are no continuation.
    assert_eq!(steps("RUN a \\\\\nRUN b"), [run("a \\\\"), run("b")]);
}

#[test]
fn escape_directive_changes_the_continuation() {
    let file = parse("# syntax=x\n# escape=`\nFROM scratch\nRUN a `\n b\\\nRUN c");
    assert_eq!(file.escape, '`');
    let made: Vec<_> = file.stages[0].steps.iter().map(|step| step.instruction.clone()).collect();
    assert_eq!(made, [run("a  b\\"), run("c")]);
    // Behind a comment, it is one itself.
    assert_eq!(parse("# hello\n# escape=`\nFROM scratch").escape, '\\');
    assert_eq!(problem("# escape=x\nFROM scratch").0, 1);
    assert_eq!(problem("# escape=`\n# escape=`\nFROM scratch").0, 2);
}

#[test]
fn heredocs_belong_to_their_instruction() {
    let made = steps("RUN <<A cat <<-'B'\none\nA\n\ttwo $x\n\tB\nCMD x");
    let Instruction::Run { heredocs, command, .. } = &made[0] else { panic!("{made:?}") };
    assert_eq!(*command, Command::Shell("<<A cat <<-'B'".into()));
    let of = |name: &str, expand, content: &str| Heredoc {
        name: name.into(),
        descriptor: 0,
        expand,
        content: content.into(),
    };
    assert_eq!(*heredocs, [of("A", true, "one\n"), of("B", false, "two $x\n")]);
    assert!(matches!(made[1], Instruction::Cmd(_)));
    let copied = steps("COPY <<a.txt <<b.txt c /dir/\n1\na.txt\n2\nb.txt\n");
    let Instruction::Transfer(copy) = &copied[0] else { panic!("{copied:?}") };
    assert_eq!(copy.sources.len(), 3);
    assert_eq!(copy.sources[2], TransferSource::Path("c".into()));
    let (line, error) = problem("FROM scratch\nRUN <<EOF\nnever\n");
    assert!(line == 2 && error.contains("EOF"), "{error}");
    // Not for other instructions, and not a here-string.
    assert_eq!(steps("RUN cat <<<EOF"), [run("cat <<<EOF")]);
    assert_eq!(steps("ENV a=<<b"), [Instruction::Env(vec![("a".into(), "<<b".into())])]);
}

#[test]
fn errors_have_the_line_and_its_text() {
    for (text, line, words) in [
        ("FROM a\n\nRUNN x", 3, "RUN?"),
        ("RUN x", 1, "FROM"),
        ("", 1, "no FROM"),
        ("FROM a\nCOPY x", 2, "target"),
        ("FROM a\nCOPY --frm=b x y", 2, "--frm"),
        ("FROM a b c", 1, "AS"),
        ("FROM a AS 1x", 1, "1x"),
        ("FROM a AS b\nFROM c AS B", 2, "earlier stage"),
        ("FROM a\nENV x", 2, "NAME=VALUE"),
        ("FROM a\nENV a=1 b", 2, "`b`"),
        ("FROM a\nSHELL sh", 2, "JSON"),
        ("FROM a\nHEALTHCHECK --interval=1x CMD a", 2, "1x"),
        ("FROM a\nHEALTHCHECK foo", 2, "NONE"),
        ("FROM a\nONBUILD FROM x", 2, "trigger"),
        ("FROM a\nONBUILD RUNN x", 2, "RUNN"),
        ("FROM a\nUSER", 2, "USER"),
        ("FROM a\nUSER --x y", 2, "--x"),
        ("FROM a\nVOLUME []", 2, "VOLUME"),
        ("FROM a\nARG 1=2", 2, "1=2"),
        ("FROM a\nRUN []", 2, "no command"),
        ("FROM a\nHEALTHCHECK CMD []", 2, "no command"),
    ] {
        let (at, error) = problem(text);
        assert_eq!(at, line, "{text}: {error}");
        assert!(error.contains(words), "{text}: {error}");
    }
}

#[test]
fn forms_and_flags_are_told_apart() {
    let made =
        steps("RUN --mount=type=cache,target=\"/a b\" --network=none [\"x\", \"y z\"]\nCMD [\"a\", b]");
    let Instruction::Run { flags, command, .. } = &made[0] else { panic!() };
    assert_eq!(flags[0].value.as_deref(), Some("type=cache,target=/a b"));
    assert_eq!(flags[1].name, "network");
    assert_eq!(*command, Command::Exec(vec!["x".into(), "y z".into()]));
    // What only looks like JSON is for the shell.
    assert_eq!(made[1], Instruction::Cmd(Command::Shell("[\"a\", b]".into())));
    let copied = steps("COPY [\"a b\", \"c\", \"/d e/\"]");
    let Instruction::Transfer(copy) = &copied[0] else { panic!() };
    assert_eq!((copy.sources.len(), copy.target.as_str()), (2, "/d e/"));
}

#[test]
fn empty_array_is_a_command_and_an_entry_point() {
    let nothing = Command::Exec(Vec::new());
    assert_eq!(
        steps("CMD []\nENTRYPOINT [ ]"),
        [Instruction::Cmd(nothing.clone()), Instruction::Entrypoint(nothing)]
    );
}

#[test]
fn pairs_have_two_notations() {
    let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(steps("ENV a b  c"), [Instruction::Env(vec![pair("a", "b  c")])]);
    let both = vec![pair("a", "\"1 2\""), pair("b", "3\\ 4")];
    assert_eq!(steps("ENV a=\"1 2\" b=3\\ 4"), [Instruction::Env(both)]);
}

#[test]
fn health_check_reads_times_of_go() {
    let made = steps("HEALTHCHECK --interval=1m30s --timeout=500ms --retries=3 CMD a b");
    let Instruction::HealthCheck(check) = &made[0] else { panic!() };
    assert_eq!(check.times_ns, [Some(90_000_000_000), Some(500_000_000), None, None]);
    assert_eq!((check.retries, &check.command), (Some(3), &Some(Command::Shell("a b".into()))));
}

fn expand(text: &str) -> Result<String, String> {
    words::expand(text, '\\', &|name| match name {
        "a" => Some("1".into()),
        "empty" => Some(String::new()),
        "path" => Some("/usr/lib/x.tar.gz".into()),
        "two" => Some("x y".into()),
        _ => None,
    })
}

#[test]
fn words_are_expanded_as_a_shell_would() {
    for (text, expected) in [
        ("$a-${a}b$ab", "1-1b"),
        ("'$a' \"$a\"", "$a 1"),
        ("\\$a \"\\$a\" '\\$a'", "$a $a \\$a"),
        ("\"\\n\\\\\"", "\\n\\"),
        ("${none:-x${a}y}", "x1y"),
        ("${empty:-x}${empty-y}", "x"),
        ("${a:+set}${none:+set}${empty+set}", "setset"),
        (
            "${path##*/} ${path#*/} ${path%.*} ${path%%.*}",
            "x.tar.gz usr/lib/x.tar.gz /usr/lib/x.tar /usr/lib/x",
        ),
        (
            "${path/lib/LIB} ${path//[/x} ${path//?ar/-}",
            "/usr/LIB/x.tar.gz /usr/lib/x.tar.gz /usr/lib/x.-.gz",
        ),
        ("${a:?must}", "1"),
        ("$ $$ a$", "$  a$"),
        ("end\\", "end\\"),
    ] {
        assert_eq!(expand(text).as_deref(), Ok(expected), "{text}");
    }
    for text in ["${none:?must}", "${", "${a", "${a:=x}", "'a", "\"a", "${}", "${a/x"] {
        assert!(expand(text).is_err(), "{text}");
    }
}

#[test]
fn words_split_where_values_have_blanks_outside_quotes() {
    let lookup = |name: &str| (name == "two").then(|| "x y".to_owned());
    let made = words::expand_words("$two \"$two\" a\\ b '' c", '\\', &lookup).unwrap();
    assert_eq!(made, ["x", "y", "x y", "a b", "", "c"]);
}

#[test]
fn expansion_is_bounded_in_size_and_depth() {
    let large = "x".repeat(600_000);
    assert!(words::expand("$l$l", '\\', &|_| Some(large.clone())).is_err());
    let deep = "${a:-".repeat(1000) + &"}".repeat(1000);
    assert!(words::expand(&deep, '\\', &|_| None).is_err());
    let stars = format!("${{l#{}y}}", "*".repeat(2000));
    words::expand(&stars, '\\', &|_| Some("x".repeat(2000))).unwrap();
}

#[test]
fn trigger_is_one_instruction() {
    assert_eq!(Dockerfile::parse_trigger("RUN x").unwrap().instruction, run("x"));
    for bad in ["", "FROM x", "RUN a\nRUN b", "ONBUILD RUN x", "NOPE"] {
        assert!(Dockerfile::parse_trigger(bad).is_err(), "{bad}");
    }
    let made = steps("ONBUILD RUN <<E\nx\nE\n");
    let Instruction::OnBuild(trigger) = &made[0] else { panic!() };
    assert!(
        matches!(Dockerfile::parse_trigger(trigger).unwrap().instruction, Instruction::Run { heredocs, .. } if heredocs[0].content == "x\n")
    );
}

proptest::proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "(FROM|RUN|COPY|ENV|ARG|ONBUILD|# escape=`|<<E|[ \\\\\n\"'$\\{\\}=a-z\\[\\],-]){0,60}") {
        if let Ok(file) = Dockerfile::parse(&text) {
            let _ = words::expand(&text, file.escape, &|name| Some(name.to_owned()));
        }
    }
}
