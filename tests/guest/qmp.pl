#!/usr/bin/perl
# qmp.pl SOCKET COMMAND...: sends QMP commands (JSON, one argument each) and prints each answer's "return" on a line.
# qmp.pl --show-stats SOCKET: asks query-blockstats for all nodes and prints a table.
#
# For ./demo and for trying things by hand. Perl, since git brings it along everywhere and it speaks to unix sockets.
# Ends with the error's text and a status other than 0 when a command is refused, and when nothing answers for 20 seconds.
use strict;
use warnings;
use IO::Handle;
use IO::Socket::UNIX;
use JSON::PP;

$SIG{ALRM} = sub { die "qmp.pl: no answer within 20 seconds\n" };
alarm 20;

my $json = JSON::PP->new->canonical;
my $table = @ARGV && $ARGV[0] eq '--show-stats' ? shift : '';
my ($path, @commands) = @ARGV;
die "usage: qmp.pl SOCKET COMMAND... | qmp.pl --show-stats SOCKET\n" unless defined $path && ($table xor @commands);

my $socket = IO::Socket::UNIX->new(Type => SOCK_STREAM, Peer => $path) or die "qmp.pl: $path: $!\n";
$socket->autoflush(1);
answer('QMP', 'the greeting');
ask('{"execute": "qmp_capabilities"}');
if ($table) {
    show_stats(ask('{"execute": "query-blockstats", "arguments": {"query-nodes": true}}'));
} else {
    print $json->allow_nonref->encode(ask($_)), "\n" for @commands;
}

# Sends one command and gives what it returns.
sub ask {
    my ($command) = @_;
    print {$socket} "$command\n";
    return answer('return', $command);
}

# Reads up to the next message that is no event, and gives the member named.
sub answer {
    my ($member, $what) = @_;
    while (defined(my $line = <$socket>)) {
        my $message = $json->decode($line);
        return $message->{$member} if exists $message->{$member};
        die "qmp.pl: $what: $message->{error}{desc}\n" if $message->{error};
    }
    die "qmp.pl: the monitor closed the connection\n";
}

sub show_stats {
    my ($nodes) = @_;
    my @columns = qw(rd_operations wr_operations rd_bytes wr_bytes flush_operations);
    printf "   %-12s %14s %14s %14s %14s %16s\n", 'node', @columns;
    for my $node (@$nodes) {
        printf "   %-12s %14s %14s %14s %14s %16s\n", $node->{'node-name'} // '-',
            map { $node->{stats}{$_} // '-' } @columns;
    }
}
